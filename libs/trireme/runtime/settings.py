"""Settings from the environment into one frozen dataclass per service."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from trireme.errors import InvalidConfiguration

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def load(settings_class: type[T], environ: Mapping[str, str], *, prefix: str) -> T:
    """Build `settings_class` from variables named `prefix` + FIELD in upper case.

    Fields may be str, int, float, bool, Path, tuple[str, ...] (comma-separated) or one of
    these or None. An absent variable keeps the field's default.

    Raises:
        InvalidConfiguration: a variable with the prefix names no field, has a malformed
            value, or a field without default is absent.
    """
    hints = typing.get_type_hints(settings_class)
    fields = {field.name: field for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in fields:
            known = ", ".join(sorted(prefix + field.upper() for field in fields))
            raise InvalidConfiguration(f"{variable} is not a setting; known are {known}", param=variable)
        values[name] = _parse(variable, text, hints[name])
    for name, field in fields.items():
        absent = name not in values and field.default is dataclasses.MISSING
        if absent and field.default_factory is dataclasses.MISSING:
            variable = prefix + name.upper()
            raise InvalidConfiguration(f"{variable} is required", param=variable)
    return settings_class(**values)


def dump(settings: object, *, prefix: str) -> dict[str, str]:
    """The variables that `load` turns back into `settings`; None is left out."""
    variables = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if value is None:
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        variables[prefix + field.name.upper()] = text
    return variables


def _parse(variable: str, text: str, hint: object) -> object:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if text == "" else _parse(variable, text, inner[0])
    if origin is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise InvalidConfiguration(f"{variable}={text!r} is not a boolean: use true or false", param=variable)
    if hint in (int, float, str, Path):
        try:
            return typing.cast(type, hint)(text)
        except ValueError:
            kind = typing.cast(type, hint).__name__
            raise InvalidConfiguration(f"{variable}={text!r} is not a valid {kind}", param=variable) from None
    raise TypeError(f"{variable}: settings of type {hint} are not supported")
