#!/usr/bin/env bash
# Install one service, or all, into PREFIX, as services/Dockerfile does. Usage:
#   .ci/image_build.sh slim|cuda all|gateway|scheduler|worker|kvstore|power|placement PREFIX
#
# PREFIX is a virtual environment of the Python that `PYTHON` names (python3). It ends without pip, and with
# the compiled CPU kernels inside: no compiler is needed where it runs. Only workers get PyTorch;
# TORCH_INDEX_URL names an index with a build for CPUs alone. With CHECK_HASHES=1 a wheel whose hash is not in
# .ci/wheel_hashes.txt fails the build.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$1 service=$2 prefix=$3
services=(gateway scheduler worker kvstore power placement)
case $target in slim | cuda) ;; *) echo "image_build: no target $target: slim or cuda" >&2; exit 2 ;; esac
if [ "$service" != all ]; then
  [[ " ${services[*]} " == *" $service "* ]] \
    || { echo "image_build: no service $service: all, ${services[*]}" >&2; exit 2; }
  services=("$service")
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$prefix"
python=$prefix/bin/python
pip=("$python" -m pip --disable-pip-version-check --no-cache-dir)

"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$scratch" .
wheel=$(echo "$scratch"/trireme-*.whl)
"$python" - "$wheel" <<'PY' \
  || { echo "image_build: the wheel has no CPU kernels: is there a C++ compiler?" >&2; exit 1; }
import fnmatch
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
sys.exit(not fnmatch.filter(names, "trireme/kernels/libtrireme_cpu_*.so"))
PY

extras=local
[ "$target" = cuda ] && extras=$extras,nvidia
[[ " ${services[*]} " == *" placement "* ]] && extras=$extras,kubernetes
if [[ " ${services[*]} " == *" worker "* ]]; then
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    "${pip[@]}" install --quiet --report "$scratch/torch.json" -c constraints.txt --index-url "$TORCH_INDEX_URL" torch
  fi
  "${pip[@]}" install --quiet --report "$scratch/all.json" -c constraints.txt "$wheel[$extras]"
else
  # What the wheel asks for, but PyTorch: none of these services computes.
  "$python" - "$wheel" "$extras" >"$scratch/requirements.txt" <<'PY'
import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

archive = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
extras = ["", *sys.argv[2].split(",")]
for text in Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", []):
    wanted = Requirement(text)
    marker = wanted.marker
    if wanted.name != "torch" and (marker is None or any(marker.evaluate({"extra": e}) for e in extras)):
        wanted.marker = None
        print(wanted)
PY
  "${pip[@]}" install --quiet --report "$scratch/all.json" -c constraints.txt -r "$scratch/requirements.txt"
  "${pip[@]}" install --quiet --no-deps "$wheel"
fi

if [ "${CHECK_HASHES:-0}" = 1 ]; then
  "$python" .ci/wheel_hashes.py check "$scratch"/*.json
fi

# Gateways read the tokenizers, workers the weights.
if [[ " ${services[*]} " == *" gateway "* || " ${services[*]} " == *" worker "* ]]; then
  mkdir -p "$prefix/share/checkpoints"
  cp -R checkpoints/trireme-py-* "$prefix/share/checkpoints/"
fi
redis=$("$python" -c 'from trireme.cli.redis_server import find_binary; print(find_binary())')
ln -sf "$redis" "$prefix/bin/redis-server"
install -m 0755 services/serve.sh "$prefix/bin/serve"
install -m 0755 services/ready.py "$prefix/bin/ready"
sed -i "1s|.*|#!$python|" "$prefix/bin/ready"

for name in "${services[@]}"; do
  "$python" -I -c "import importlib, sys; importlib.import_module(sys.argv[1])" "trireme.$name.__main__"
done
if [[ " ${services[*]} " == *" placement "* ]]; then
  "$python" -I -c 'import trireme.placement.kubernetes_backend'
fi
if [[ " ${services[*]} " == *" worker "* ]]; then
  "$python" -I -c 'from trireme.kernels import cpu_build; assert cpu_build.library_path().exists()'
fi
"$python" -m pip --disable-pip-version-check uninstall --quiet --yes setuptools pip 2>/dev/null || true
echo "image_build: $prefix has ${services[*]}"
