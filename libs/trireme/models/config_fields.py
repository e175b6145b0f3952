"""Typed access to the fields of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trireme.errors import InvalidCheckpoint


class Fields:
    """Typed access to the raw mapping; every error names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def bad(self, name: str, wanted: str) -> InvalidCheckpoint:
        """What to raise where a field is not what it must be."""
        value = self.raw.get(name)
        found = "is missing" if value is None else f"is {value!r}"
        return InvalidCheckpoint(f"{self.source}: {name} {found}; it must be {wanted}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.raw.get(name, default)
        if not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(name, "a positive integer")
        return value

    def index(self, name: str, default: int) -> int:
        """An integer that is not negative."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.bad(name, "an integer from 0 on")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.bad(name, "a positive number")
        return float(value)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A positive number, or null; `default` where the field is absent."""
        return None if self.raw.get(name, default) is None else self.number(name, default)

    def optional_count(self, name: str, default: int | None) -> int | None:
        """A positive integer, or null; `default` where the field is absent."""
        return None if self.raw.get(name, default) is None else self.count(name, default)

    def one_of(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise self.bad(name, "one of " + ", ".join(allowed))
        return value


def token_ids(value: object, *, source: str) -> tuple[int, ...]:
    """`eos_token_id`, which is absent, one id, or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise InvalidCheckpoint(f"{source}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return tuple(ids)
