"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trireme.errors import InvalidCheckpoint


class Metadata:
    """Every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def bad(self, key: str, wanted: str) -> InvalidCheckpoint:
        """What to raise where a value is not what it must be."""
        value = self.values.get(key)
        found = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return InvalidCheckpoint(f"{self.source}: {key} {found}; it must be {wanted}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; an array of one and the same counts as one."""
        value = self.values.get(key, default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.bad(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def token(self, key: str, vocabulary_size: int) -> int | None:
        """A token's id; None where the file names none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocabulary_size:
            raise self.bad(key, f"a token below {vocabulary_size}")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings; empty where there is none."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or (value and not isinstance(value[0], str)):
            raise self.bad(key, "an array of strings")
        return value

    def numbers(self, key: str) -> list[Any]:
        """An array of numbers; empty where there is none."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or (value and isinstance(value[0], str)):
            raise self.bad(key, "an array of numbers")
        return value
