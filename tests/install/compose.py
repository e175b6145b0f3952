"""docker-compose.yml as the tool reads it: variables replaced, merge keys applied, files laid over it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

COMPOSE_FILE = REPOSITORY / "docker-compose.yml"


def compose() -> dict[str, Any]:
    return read(COMPOSE_FILE, {})


def read(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """One file; variables are as given, or have their defaults."""
    found: dict[str, Any] = _filled(yaml.safe_load(path.read_text()), given)
    return found


def laid_over(below: Any, above: Any) -> Any:
    """What `-f below -f above` makes: mappings are merged, lists joined, and else the later one holds."""
    if isinstance(below, dict) and isinstance(above, dict):
        merged = {key: laid_over(below[key], above[key]) for key in below.keys() & above.keys()}
        return {**below, **above, **merged}
    if isinstance(below, list) and isinstance(above, list):
        return [*below, *above]
    return above


def _filled(value: Any, given: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, given) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, given) for inner in value]
    if isinstance(value, str):

        def fill(found: re.Match[str]) -> str:
            name, default = found[1], found[3] if found[2] == ":-" else None
            text = given.get(name) or default
            assert text is not None, f"{value}: {name} was not given"
            return text

        filled = re.sub(r"(?<!\$)\$\{(\w+)(:[-?])([^}]*)\}", fill, value)
        assert not re.search(r"(?<!\$)\$(?!\$)", filled), f"{value}: a variable without a default"
        return filled.replace("$$", "$")
    return value
