#!/usr/bin/env bash
# Regenerate libs/trireme/wire from proto/. With --check, fail if that would change a file.
set -euo pipefail
cd "$(dirname "$0")/.."
out=libs
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
mapfile -t files < <(find proto -name '*.proto' | sort)
.venv/bin/python -m grpc_tools.protoc -I proto --python_out="$out" --grpc_python_out="$out" \
  --plugin=protoc-gen-mypy=.venv/bin/protoc-gen-mypy --mypy_out="quiet:$out" \
  --plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc --mypy_grpc_out="quiet:$out" "${files[@]}"
[ "$out" = libs ] || diff -r -x __pycache__ -x '__init__.py' "$out/trireme/wire" libs/trireme/wire
