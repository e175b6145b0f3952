"""Secrets and texts are taken out of whatever leaves the machine in a bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

GONE = "[redacted]"
LEAST_SECRET = 6
"""Characters; shorter values would be cut out of innocent words."""
_SECRET_NAME = re.compile(
    r"(^|[_.-])(key|keys|secret|token|password|passwd|pwd|auth|authorization|cookie|credential|credentials"
    r"|headers|salt|api_?key|requirepass)($|[_.-])",
    re.IGNORECASE,
)
_TEXT_NAME = re.compile(
    r"^(prompt|prompts|text|texts|content|messages|message_text|system|answer|input|output|instructions)$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s\"'@]*@")
_CREDENTIALS = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}")
_KEY_SHAPES = re.compile(r"\b(trk_|sk-|hf_)[A-Za-z0-9_-]{16,}")
"""Our own API keys, and those of the services that users know best."""
_PASSWORD_IN_URL = re.compile(r"://[^/\s\"'@:]*:(?P<password>[^/\s\"'@]+)@")


def is_secret_name(name: str) -> bool:
    """Whether what is called so is kept out, be it a variable or a key of a document."""
    return _SECRET_NAME.search(name) is not None and not name.lower().endswith(("_file", "_path", "_tokens"))


def secret_values(environ: Mapping[str, str]) -> set[str]:
    """The values to look for everywhere else: those of secret names, and passwords in URLs."""
    found = {value for name, value in environ.items() if is_secret_name(name)}
    for value in environ.values():
        found |= {match["password"] for match in _PASSWORD_IN_URL.finditer(value)}
    return {value for value in found if len(value) >= LEAST_SECRET}


class Redactor:
    """Takes known secrets out, and whatever looks like one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        ordered = sorted({s for s in secrets if len(s) >= LEAST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def text(self, text: str) -> str:
        """Without secrets."""
        if self._known is not None:
            text = self._known.sub(GONE, text)
        text = _USERINFO.sub(rf"\g<scheme>{GONE}@", text)
        text = _CREDENTIALS.sub(rf"\1 {GONE}", text)
        return _KEY_SHAPES.sub(GONE, text)

    def value(self, value: Any, *, name: str = "") -> Any:
        """A document without secrets and texts, by what its parts are called and what they look like."""
        if name and (is_secret_name(name) or _TEXT_NAME.match(name)) and value not in (None, "", [], {}):
            return GONE if not isinstance(value, (bool, int, float)) else value
        if isinstance(value, Mapping):
            return {str(key): self.value(inner, name=str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(inner) for inner in value]
        return self.text(value) if isinstance(value, str) else value

    def log_line(self, line: str) -> str:
        """A line of a log: by its fields where it is JSON."""
        try:
            fields = json.loads(line)
        except ValueError:
            return self.text(line)
        return json.dumps(self.value(fields)) if isinstance(fields, dict) else self.text(line)

    def settings(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Variables, secrets left out."""
        return {
            name: GONE if is_secret_name(name) and value else self.text(value)
            for name, value in sorted(environ.items())
        }
