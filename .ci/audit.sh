#!/usr/bin/env bash
# Write build/sbom.cdx.json (CycloneDX, of .venv) and compare what is installed with the known vulnerabilities.
# Usage: .ci/audit.sh
#
# Its tools have an environment of their own, .tools/audit. Ends with 1 where something installed has a known
# vulnerability; where the tools or their database are out of reach it says so, and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
tools=.tools/audit

[ -x .venv/bin/python ] || { echo "audit: there is no .venv: make setup" >&2; exit 2; }
if [ ! -f "$tools/.installed" ]; then
  "$python" -m venv "$tools"
  "$tools/bin/pip" --disable-pip-version-check install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1 \
    || { echo "audit: its tools cannot be installed here; nothing was audited"; exit 0; }
  touch "$tools/.installed"
fi

mkdir -p build
"$tools/bin/cyclonedx-py" environment .venv/bin/python --pyproject pyproject.toml --output-reproducible \
  --output-format JSON --output-file build/sbom.cdx.json
"$python" - build/sbom.cdx.json <<'PY'
import json
import sys

components = json.load(open(sys.argv[1], encoding="utf-8"))["components"]
unknown = sorted(c["name"] for c in components if not c.get("licenses"))
print(f"audit: build/sbom.cdx.json names {len(components)} components, {len(unknown)} without a licence"
      + (": " + ", ".join(unknown) if unknown else ""))
PY

found=0
"$tools/bin/pip-audit" --path "$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')" \
  --progress-spinner off --format json --output build/audit.json 2>build/audit.log || found=$?
[ -s build/audit.json ] || { echo "audit: the database cannot be reached: $(tail -n 1 build/audit.log)"; exit 0; }
"$python" - build/audit.json "$found" <<'PY'
import json
import sys

dependencies = json.load(open(sys.argv[1], encoding="utf-8"))["dependencies"]
looked_up = [d for d in dependencies if "skip_reason" not in d]
print(f"audit: {len(looked_up)} of {len(dependencies)} packages are known to the database")
for one in looked_up:
    for vulnerability in one["vulns"]:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
        print(f"audit: {one['name']} {one['version']} has {vulnerability['id']}; fixed in {fixed}")
sys.exit(any(one["vulns"] for one in looked_up))
PY
