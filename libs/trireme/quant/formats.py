"""The weight formats by name: how many bits, and what shares a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trireme.errors import InvalidConfiguration
from trireme.quant.minifloat import FP5_E2M2, FP6_E2M3, FP6_E3M2, Minifloat

GROUP_SIZES: Final = (32, 64, 128)
"""Consecutive input channels of one row that may share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How one weight matrix (output channels, input channels) becomes codes and scales."""

    name: str
    """As in `config.json`."""
    bits: int
    """Of one code."""
    minifloat: Minifloat | None = None
    """The values that codes stand for; None: integers."""
    group_size: int | None = None
    """Input channels that share a scale; None: the whole row does."""
    has_zeros: bool = False
    """Whether each group has a zero point; without, integers are offset by half their range."""

    @property
    def has_signed_scales(self) -> bool:
        """Whether a scale's sign says which sign the group's code of the largest magnitude has.

        Of 16 integers one more is negative than positive; the group's largest weight takes that one.
        """
        return self.group_size is not None and not self.has_zeros

    def groups(self, in_channels: int) -> int:
        """Scales of one row."""
        return 1 if self.group_size is None else in_channels // self.group_size


def _minifloat(name: str, form: Minifloat) -> WeightFormat:
    return WeightFormat(name=name, bits=form.bits, minifloat=form)


_ALL: Final = (
    _minifloat("fp6_e3m2", FP6_E3M2),
    _minifloat("fp6_e2m3", FP6_E2M3),
    _minifloat("fp5_e2m2", FP5_E2M2),
    WeightFormat(name="int8_ch", bits=8),
    *(WeightFormat(name=f"int4_g{size}", bits=4, group_size=size) for size in GROUP_SIZES),
    *(
        WeightFormat(name=f"int4_g{size}_zeros", bits=4, group_size=size, has_zeros=True)
        for size in GROUP_SIZES
    ),
)
FORMATS: Final[Mapping[str, WeightFormat]] = {form.name: form for form in _ALL}


def weight_format(name: str) -> WeightFormat:
    """Look a format up.

    Raises:
        InvalidConfiguration: there is none of that name; names those that there are.
    """
    found = FORMATS.get(name)
    if found is None:
        raise InvalidConfiguration(
            f"weight format {name!r} does not exist; use one of {', '.join(FORMATS)}", param="format"
        )
    return found
