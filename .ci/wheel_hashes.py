"""What an image installs is what was looked at: pip's reports against recorded hashes.

    python .ci/wheel_hashes.py check REPORT...     fail unless each wheel's hash is in wheel_hashes.txt
    python .ci/wheel_hashes.py add REPORT...       record them, of another platform or version

REPORT is what `pip install --report` writes. A line of wheel_hashes.txt is a name, a version and a SHA-256;
one name may have several, for several platforms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RECORD = Path(__file__).with_name("wheel_hashes.txt")


def wheels_of(report: Path) -> set[str]:
    """The lines of what was installed from an index; what came from a directory has no hash to compare."""
    lines = set()
    for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
        hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name != "trireme":
            lines.add(f"{name} {item['metadata']['version']} {hashes.get('sha256', 'without-a-hash')}")
    return lines


def main(arguments: list[str]) -> int:
    known = set(RECORD.read_text(encoding="utf-8").splitlines()) if RECORD.exists() else set()
    found = set().union(*(wheels_of(Path(report)) for report in arguments[1:]))
    if arguments[:1] == ["add"]:
        RECORD.write_text("".join(f"{line}\n" for line in sorted(known | found)), encoding="utf-8")
        return 0
    if arguments[:1] != ["check"] or not found:
        print(__doc__, file=sys.stderr)
        return 2
    for line in sorted(found - known):
        print(f"wheel_hashes: {line} is not recorded: look at it, then run `add`", file=sys.stderr)
    return 1 if found - known else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
