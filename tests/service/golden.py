"""Golden files: what a call was answered, with ids, times and measurements made equal."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "golden"
REWRITE = "TRIREME_REWRITE_GOLDEN"
"""Set it, and the files are written anew instead of being compared."""

_IDS = [
    (re.compile(r"(chatcmpl-|cmpl-)?req-[0-9a-f]{24}"), r"\1<request>"),
    (re.compile(r"(resp|msg|fc|batch_req|batch)_[0-9a-f]{32,48}"), r"\1_<id>"),
    (re.compile(r"file-[0-9a-f]{32}"), "file-<id>"),
]
_TIMES = re.compile(r"created|.*_at")
_MEASURED = ("queue_s", "first_token_s", "total_s", "paused_s")


def normalised(value: Any, name: str = "") -> Any:
    """The same with everything that differs from run to run replaced."""
    if isinstance(value, dict):
        return {key: normalised(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [normalised(inner, name) for inner in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float) and _TIMES.fullmatch(name):
        return "<time>"
    if isinstance(value, int | float) and name in _MEASURED:
        return "<seconds>"
    if isinstance(value, str):
        for pattern, instead in _IDS:
            value = pattern.sub(instead, value)
    return value


def compare(name: str, found: Any) -> None:
    """Compare with golden/NAME.json, or write it."""
    file = FOLDER / f"{name}.json"
    text = json.dumps(normalised(found), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get(REWRITE):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"no {file.name}: write it with {REWRITE}=1"
    had = json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    changes = difflib.unified_diff(had.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=2)
    assert had == text, "\n".join(changes)
