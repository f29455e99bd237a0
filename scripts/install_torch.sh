#!/usr/bin/env bash
# Install PyTorch into the venv whose python is given: with CUDA where there is an NVIDIA GPU, else the CPU build,
# which is a tenth of the download. Usage: install_torch.sh .venv/bin/python 'torch==2.13.*'
set -euo pipefail
python=$1
torch=$2
pip=("$python" -m pip --disable-pip-version-check)

# Already there, in the wanted version? Then there is nothing to do.
prefix=${torch#*==}
if "$python" -c '
import sys
from importlib.metadata import version
sys.exit(not version("torch").startswith(sys.argv[1]))' "${prefix%\*}" 2>/dev/null; then
    exit 0
fi

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "NVIDIA GPU found: installing $torch with CUDA"
    exec "${pip[@]}" install -qq "$torch"
fi

# macOS has no other build than the one we want.
if [ "$(uname -s)" = Darwin ]; then
    exec "${pip[@]}" install -qq "$torch"
fi

# 1. The user's own pip configuration may already lead to a CPU build (its version ends in +cpu): ask without
#    installing anything.
offered=$("${pip[@]}" install -qq --dry-run --no-deps --ignore-installed --report - "$torch" 2>/dev/null |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true)
if [[ $offered == *+cpu ]]; then
    echo "no NVIDIA GPU: installing torch $offered from your package index"
    exec "${pip[@]}" install -qq "torch==$offered"
fi

# 2. uv knows where PyTorch publishes its CPU builds.
echo "no NVIDIA GPU: looking for the CPU build of $torch"
if "${pip[@]}" install -qq uv &&
    "$python" -m uv pip install --quiet --python "$python" --torch-backend=cpu "$torch" 2>/dev/null; then
    exit 0
fi

# 3. The ordinary build runs on CPUs too; it is only larger.
echo "the CPU build cannot be reached: installing the ordinary $torch (larger, works the same)"
exec "${pip[@]}" install -qq "$torch"
