"""A batch's input: JSON lines, each a call of its own.

What is wrong with a line as a line (no JSON, no custom_id or one that came before, another path)
fails the batch before anything runs, with the line's number. What is wrong with the call that it
makes is that line's result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_FAULTS = 100
"""Faults that are told; more are not looked for."""
MAX_CUSTOM_ID = 512
"""Characters."""
_KNOWN = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """One call."""

    custom_id: str
    body: bytes
    """JSON."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line."""

    code: str
    message: str
    line: int | None
    """From 1; None: it is about the file."""
    param: str | None = None

    def shown(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


@dataclass(frozen=True, slots=True)
class Input:
    """What a file says."""

    lines: list[Line]
    model: str
    """That of the first line."""
    faults: list[Fault]


def read_lines(data: bytes, *, endpoint: str, max_lines: int, max_line_bytes: int) -> Input:
    """Read a file; its lines are of use only where there is no fault."""
    lines: list[Line] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    model = ""
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        if len(lines) >= max_lines:
            faults.append(Fault("too_many_lines", f"a batch has at most {max_lines} lines", number))
            break
        found = _line(raw, number, endpoint, seen, max_line_bytes)
        if isinstance(found, Fault):
            faults.append(found)
            if len(faults) >= MAX_FAULTS:
                break
            continue
        line, asked = found
        model = model or asked
        lines.append(line)
    if not lines and not faults:
        faults.append(Fault("empty_file", "the file has no line", None, "input_file_id"))
    return Input(lines, model, faults)


def _line(
    raw: bytes, number: int, endpoint: str, seen: set[str], max_line_bytes: int
) -> tuple[Line, str] | Fault:
    if len(raw) > max_line_bytes:
        return Fault("line_too_long", f"a line has at most {max_line_bytes} bytes", number)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return Fault("invalid_json_line", "the line is not valid JSON", number)
    if not isinstance(data, Mapping):
        return Fault("invalid_json_line", "the line must be a JSON object", number)
    for name in data:
        if name not in _KNOWN:
            return Fault(
                "unknown_parameter", f"{name[:80]} is not known; {', '.join(_KNOWN)} are", number, name[:80]
            )
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters"
        return Fault("invalid_custom_id", message, number, "custom_id")
    if custom_id in seen:
        return Fault("duplicate_custom_id", f"custom_id {custom_id[:80]!r} came before", number, "custom_id")
    if data.get("method") != "POST":
        return Fault("invalid_method", "method must be 'POST'", number, "method")
    if data.get("url") != endpoint:
        return Fault("mismatched_url", f"url must be {endpoint!r}, the batch's endpoint", number, "url")
    body = data.get("body")
    if not isinstance(body, Mapping):
        return Fault("invalid_body", "body must be a JSON object", number, "body")
    asked = body.get("model")
    if not isinstance(asked, str) or not asked:
        return Fault("missing_required_parameter", "you must provide model", number, "body.model")
    seen.add(custom_id)
    return Line(custom_id, json.dumps(body).encode()), asked
