"""Precisions by the names that fleet.yaml and the command line have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trireme.errors import InvalidConfiguration
from trireme.quant.formats import FORMATS, WeightFormat, weight_format

AUTO: Final = "auto"
"""As the checkpoint is."""
FLOATS: Final[Mapping[str, str]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
}
"""Weights that are not quantized, and the type that they are computed in."""
SHORT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "fp6": ("fp6_e2m3", "fp6_e3m2"),
    "fp5": ("fp5_e2m2",),
    "int8": ("int8_ch",),
    "int4": ("int4_g64",),
}
"""Formats that a short name stands for; of several, the one that is nearer to the weights."""


def candidate_formats(precision: str) -> tuple[WeightFormat, ...]:
    """The formats that a precision stands for; none for `auto` and floats of 16 bits and more.

    Raises:
        InvalidConfiguration: there is no such precision; names those that there are.
    """
    if precision == AUTO or precision in FLOATS:
        return ()
    names = SHORT_NAMES.get(precision, (precision,) if precision in FORMATS else ())
    if not names:
        known = ", ".join((AUTO, *FLOATS, *SHORT_NAMES, *FORMATS))
        raise InvalidConfiguration(
            f"precision {precision!r} does not exist; use one of {known}", param="precision"
        )
    return tuple(weight_format(name) for name in names)
