"""Floats of a few bits: sign, exponent, mantissa; every code is a finite value.

Source: Xia et al., Quant-LLM, USENIX ATC 2024; its FP6 and FP5 have no infinity and no NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


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
    def magnitudes(self) -> tuple[float, ...]:
        """Values of the codes without sign, ascending."""
        return _magnitudes(self)

    @property
    def max_value(self) -> float:
        """The largest magnitude."""
        return _magnitudes(self)[-1]


FP6_E3M2 = Minifloat(exponent_bits=3, mantissa_bits=2)
FP6_E2M3 = Minifloat(exponent_bits=2, mantissa_bits=3)
FP5_E2M2 = Minifloat(exponent_bits=2, mantissa_bits=2)


@functools.cache
def _magnitudes(form: Minifloat) -> tuple[float, ...]:
    lowest_exponent = 2 - 2 ** (form.exponent_bits - 1)  # 1 - bias, also that of the subnormals
    steps = 2**form.mantissa_bits

    def value(code: int) -> float:
        field, mantissa = divmod(code, steps)
        if field == 0:
            return float(mantissa * 2.0 ** (lowest_exponent - form.mantissa_bits))
        return float((steps + mantissa) * 2.0 ** (lowest_exponent + field - 1 - form.mantissa_bits))

    return tuple(value(code) for code in range(form.sign_bit))
