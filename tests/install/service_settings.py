"""The services' own settings classes, and where they say that they listen."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


def settings_class(service: str) -> type[Any]:
    found: type[Any] = importlib.import_module(f"trireme.{service}.settings").Settings
    return found


def listening(settings: Any) -> set[int]:
    """The ports that the service listens on."""
    fields = {f.name for f in dataclasses.fields(settings)} & {
        "listen",
        "metrics_listen",
        "grpc_listen",
        "http_listen",
    }
    return {int(getattr(settings, name).rpartition(":")[2]) for name in fields if getattr(settings, name)}
