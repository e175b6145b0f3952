#!/usr/bin/env bash
# Make the virtual environment with the pinned versions. Usage: .ci/setup.sh [DIRECTORY]
#
# torch: constraints.txt pins its version, not its build. Where an index offers a build for the
# CPU alone it is taken; set TORCH_INDEX_URL to point to one. With an NVIDIA GPU the default
# build, which carries CUDA, is wanted.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3.11}

command -v "$python" >/dev/null || { echo "setup: $python is not there: install Python 3.11, or set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
  || { echo "setup: $python is older than 3.11: set PYTHON" >&2; exit 2; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
extras=local,dev
command -v nvidia-smi >/dev/null && extras=$extras,nvidia
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt)
if [ -n "${TORCH_INDEX_URL:-}" ]; then
  "${pip[@]}" --index-url "$TORCH_INDEX_URL" torch
fi
"${pip[@]}" -e ".[$extras]"
# pip keeps quiet about what its build hook could not do.
"$venv/bin/python" -m trireme.kernels.cpu_build || echo "setup: no CPU kernels, PyTorch serves"
touch "$venv/.installed"
echo "setup: $venv is ready"
