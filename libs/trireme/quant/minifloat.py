"""Floats of a few bits: sign, exponent, mantissa; every code is a finite value.

Source: Xia et al., Quant-LLM, USENIX ATC 2024; its FP6 and FP5 have no infinity and no NaN.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Minifloat:
    """eXmY with bias 2**(X - 1) - 1; a code is its sign, exponent and mantissa bits, sign first.

    Exponent field 0 is subnormal; the all-ones field is an ordinary exponent. Both zeros exist.
    """

    exponent_bits: int
    mantissa_bits: int
    """At least 1, so that of two neighbours one has an even mantissa."""

    @property
    def bits(self) -> int:
        """Of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """The code of -0."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def max_value(self) -> float:
        """The largest magnitude."""
        return _magnitudes(self)[-1]

    def values(self) -> Tensor:
        """(2**bits,) float64: the value of each code, in the order of codes."""
        return _value_table(self)

    def encode(self, values: Tensor) -> Tensor:
        """Round to the nearest value, ties to the even mantissa; what is too large becomes the largest.

        Args:
            values: float64, any shape, no NaN; the sign of a zero is kept.

        Returns:
            uint8 codes of the same shape.
        """
        magnitude = torch.bucketize(values.abs(), _upper_bounds(self), out_int32=True).to(torch.uint8)
        return magnitude + values.signbit().to(torch.uint8) * self.sign_bit

    def decode(self, codes: Tensor) -> Tensor:
        """The float64 values of uint8 codes below 2**bits; exact."""
        return _value_table(self)[codes.int()]


FP6_E3M2 = Minifloat(exponent_bits=3, mantissa_bits=2)
FP6_E2M3 = Minifloat(exponent_bits=2, mantissa_bits=3)
FP5_E2M2 = Minifloat(exponent_bits=2, mantissa_bits=2)


@functools.cache
def _magnitudes(form: Minifloat) -> tuple[float, ...]:
    """Values of the codes without sign, ascending."""
    lowest_exponent = 2 - 2 ** (form.exponent_bits - 1)  # 1 - bias, also that of the subnormals
    steps = 2**form.mantissa_bits

    def value(code: int) -> float:
        field, mantissa = divmod(code, steps)
        if field == 0:
            return float(mantissa * 2.0 ** (lowest_exponent - form.mantissa_bits))
        return float((steps + mantissa) * 2.0 ** (lowest_exponent + field - 1 - form.mantissa_bits))

    return tuple(value(code) for code in range(form.sign_bit))


@functools.cache
def _value_table(form: Minifloat) -> Tensor:
    positive = torch.tensor(_magnitudes(form), dtype=torch.float64)
    return torch.cat((positive, -positive))


@functools.cache
def _upper_bounds(form: Minifloat) -> Tensor:
    """The largest magnitude that still rounds to each code but the last; float64, ascending."""
    midpoints = torch.tensor(
        [(low + high) / 2 for low, high in itertools.pairwise(_magnitudes(form))], dtype=torch.float64
    )
    is_odd = torch.arange(len(midpoints)) % 2 == 1
    # A midpoint goes to its even neighbour; above an odd code that is the next one.
    return torch.where(is_odd, torch.nextafter(midpoints, torch.zeros_like(midpoints)), midpoints)
