"""docker-compose.yml as the tool reads it: variables replaced by their defaults, merge keys applied."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.conftest import REPOSITORY

COMPOSE_FILE = REPOSITORY / "docker-compose.yml"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = _with_defaults(yaml.safe_load(COMPOSE_FILE.read_text()))
    return found


def _with_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_defaults(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_defaults(inner) for inner in value]
    if isinstance(value, str):
        filled = re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", value)
        assert not re.search(r"(?<!\$)\$(?!\$)", filled), f"{value}: a variable without a default"
        return filled.replace("$$", "$")
    return value
