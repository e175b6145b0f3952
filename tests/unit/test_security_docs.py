"""docs/security.md has every limit, with the value that it has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from trireme.gateway.settings import Settings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
UNITS = {"KiB": 2**10, "MiB": 2**20, "s": 1, "ms": 0.001, "day": 86400, "days": 86400, "": 1}


def limits() -> dict[str, float]:
    """The table's rows that name settings, in the settings' units."""
    found: dict[str, float] = {}
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", TEXT, re.MULTILINE):
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(","), strict=False):
            number = re.fullmatch(r"\s*(\d+)\s*(\w*)\s*", value)
            if number is not None:
                found.setdefault(name, float(number[1]) * UNITS[number[2]])
    return found


def test_every_limit_of_a_gateway_is_in_the_table() -> None:
    bounds = {
        field.name: field.default
        for field in dataclasses.fields(Settings)
        if field.name.startswith("max_") or field.name.endswith(("_bytes", "_ttl_s"))
    }
    told = limits()
    assert bounds.keys() - told.keys() == set()
    assert {name: told[name] for name in bounds} == bounds


def test_what_the_table_tells_of_other_settings_is_so() -> None:
    values = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, told in limits().items():
        if name in values:
            assert told == values[name], name
