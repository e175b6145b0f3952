"""Sliding windows of the layers, read from a `config.json`."""

from __future__ import annotations

from trireme.errors import InvalidCheckpoint
from trireme.models.config_fields import Fields


def windows_of_types(fields: Fields, num_layers: int, window: int) -> tuple[int | None, ...]:
    """What `layer_types` says: `window` where it names sliding_attention.

    Raises:
        InvalidCheckpoint: it does not name one of the two types for each layer.
    """
    layer_types = fields.raw.get("layer_types")
    known = {"full_attention": None, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(isinstance(name, str) and name in known for name in layer_types)
    ):
        raise InvalidCheckpoint(
            f"{fields.source}: layer_types must name full_attention or sliding_attention for each of "
            f"{num_layers} layers"
        )
    return tuple([known[name] for name in layer_types])
