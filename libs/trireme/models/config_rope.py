"""Rotary positions, read from a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from trireme.errors import InvalidCheckpoint
from trireme.models.config import RopeConfig, RopeKind
from trireme.models.config_fields import Fields

_LAYER_TYPES: Final = ("full_attention", "sliding_attention")
_OLD_NAMES: Final = {"su": "longrope"}


def parse_rope(
    fields: Fields, *, default_theta: float = 10000.0, layer_type: str | None = None
) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of older files.

    Args:
        fields: of the whole file.
        default_theta: where the file gives none.
        layer_type: whose of an architecture that rotates by two rules; None: there is one.

    Raises:
        InvalidCheckpoint: the kind is not supported, or one of its numbers is missing or malformed.
    """
    rope = _merged(fields, layer_type)
    name = rope.raw.get("rope_type") or rope.raw.get("type") or "default"
    try:
        kind = RopeKind(_OLD_NAMES.get(name, name))
    except (ValueError, TypeError):
        supported = ", ".join(kind.value for kind in RopeKind)
        raise InvalidCheckpoint(
            f"{fields.source}: rope_type {name!r} is not supported; use one of {supported}"
        ) from None
    theta = rope.number("rope_theta", default_theta)
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta=theta)
    if kind is RopeKind.LONGROPE:
        return _longrope(fields, rope, theta)
    factor = rope.number("factor")
    if kind is not RopeKind.LLAMA3:
        return RopeConfig(kind=kind, theta=theta, factor=factor)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.count(
            "original_max_position_embeddings", fields.raw.get("original_max_position_embeddings")
        ),
    )


def rotary_share(fields: Fields) -> float:
    """The share of each head that is rotated: 1 for all of it.

    Raises:
        InvalidCheckpoint: it is no number above 0 and up to 1.
    """
    parts = _merged(fields, None)
    holder = parts if parts.raw.get("partial_rotary_factor") is not None else fields
    share = holder.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise holder.bad("partial_rotary_factor", "at most 1")
    return share


def _merged(fields: Fields, layer_type: str | None) -> Fields:
    """The rope fields in one mapping, whichever version wrote them."""
    raw = fields.raw
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = raw.get(name)
        if part is not None and not isinstance(part, Mapping):
            raise InvalidCheckpoint(f"{fields.source}: {name} is {part!r}; it must be an object")
        if part and layer_type is not None and any(key in part for key in _LAYER_TYPES):
            part = part.get(layer_type) or {}
            if not isinstance(part, Mapping):
                raise InvalidCheckpoint(f"{fields.source}: {name}.{layer_type} must be an object")
        elif layer_type == "sliding_attention":
            part = None  # Older files scale only the layers without a window.
        merged.update(part or {})
    theta = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
    return Fields({"rope_theta": raw.get(theta), **merged}, f"{fields.source}: rope_parameters")


def _longrope(fields: Fields, rope: Fields, theta: float) -> RopeConfig:
    """Source: Ding et al., LongRoPE, 2024; the amplitude as the published Phi-3 models compute it."""
    trained = fields.count("max_position_embeddings")
    original = fields.raw.get("original_max_position_embeddings")
    if original is None:
        original = rope.count("original_max_position_embeddings", trained)
    else:
        original = fields.count("original_max_position_embeddings")
    factor = rope.number("factor", trained / original)
    amplitude = 1.0
    if factor > 1 and original > 1:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        kind=RopeKind.LONGROPE,
        theta=theta,
        factor=factor,
        original_max_positions=original,
        short_factors=_factors(rope, "short_factor"),
        long_factors=_factors(rope, "long_factor"),
        amplitude=rope.number("attention_factor", amplitude),
    )


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    values = rope.raw.get(name)
    if not isinstance(values, list) or not values:
        raise rope.bad(name, "a list of positive numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise rope.bad(name, "a list of positive numbers")
    return tuple([float(value) for value in values])
