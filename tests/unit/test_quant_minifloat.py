"""Minifloats: every code against its definition, every rounding against a search of all values."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.quant.minifloat import FP5_E2M2, FP6_E2M3, FP6_E3M2, Minifloat
from trireme.quant.minifloat_codes import decode, encode, values_of

FORMS = pytest.mark.parametrize("form", [FP6_E3M2, FP6_E2M3, FP5_E2M2], ids=["e3m2", "e2m3", "e2m2"])
E3M2_BY_HAND = [
    *(0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75),
    *(2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
]


def defined_value(form: Minifloat, code: int) -> Fraction:
    """From the bits of the code, in rational numbers."""
    digits = f"{code:0{form.bits}b}"
    sign = -1 if digits[0] == "1" else 1
    exponent = int(digits[1 : 1 + form.exponent_bits], 2)
    mantissa = Fraction(int(digits[1 + form.exponent_bits :], 2), 2**form.mantissa_bits)
    bias = 2 ** (form.exponent_bits - 1) - 1
    if exponent == 0:
        return sign * Fraction(2) ** (1 - bias) * mantissa
    return sign * Fraction(2) ** (exponent - bias) * (1 + mantissa)


def nearest_code(form: Minifloat, value: float) -> int:
    """By looking at all codes of the value's sign: the nearest, of two the one with an even mantissa."""
    is_negative = str(value).startswith("-")
    codes = range(2 ** (form.bits - 1), 2**form.bits) if is_negative else range(2 ** (form.bits - 1))
    return min(codes, key=lambda code: (abs(defined_value(form, code) - Fraction(value)), code % 2))


@FORMS
def test_each_code_has_the_value_of_its_definition(form: Minifloat) -> None:
    values = decode(form, torch.arange(2**form.bits, dtype=torch.uint8))
    assert values.tolist() == [float(defined_value(form, code)) for code in range(2**form.bits)]
    assert values.isfinite().all()
    assert values[form.sign_bit].signbit() and not values[0].signbit()


def test_e3m2_has_the_values_of_the_paper() -> None:
    assert values_of(FP6_E3M2)[:32].tolist() == E3M2_BY_HAND
    assert (FP6_E3M2.max_value, FP6_E2M3.max_value, FP5_E2M2.max_value) == (28.0, 7.5, 7.0)
    assert (float(values_of(FP6_E2M3)[1]), float(values_of(FP5_E2M2)[1])) == (0.125, 0.25)


@FORMS
def test_values_come_back_as_their_own_codes(form: Minifloat) -> None:
    codes = torch.arange(2**form.bits, dtype=torch.uint8)
    assert torch.equal(encode(form, decode(form, codes)), codes)


@FORMS
def test_midpoints_and_their_neighbours_round_as_the_search_says(form: Minifloat) -> None:
    magnitudes = values_of(form)[: form.sign_bit]
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    ends = torch.tensor([0.0, form.max_value, form.max_value * 1.5, 1e300], dtype=torch.float64)
    below, above = (
        torch.nextafter(middles, torch.full_like(middles, towards)) for towards in (0.0, float("inf"))
    )
    values = torch.cat((middles, below, above, ends))
    values = torch.cat((values, -values))
    assert encode(form, values).tolist() == [nearest_code(form, value) for value in values.tolist()]


@FORMS
@settings(deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_any_value_rounds_as_the_search_says(form: Minifloat, value: float) -> None:
    assert encode(form, torch.tensor([value], dtype=torch.float64)).item() == nearest_code(form, value)


@FORMS
@settings(deadline=None)
@given(values=st.lists(st.floats(-40, 40), min_size=2))
def test_rounding_keeps_order_and_mirrors_signs(form: Minifloat, values: list[float]) -> None:
    ascending = torch.tensor(sorted(values), dtype=torch.float64)
    codes = encode(form, ascending)
    assert (decode(form, codes).diff() >= 0).all()
    assert torch.equal(encode(form, -ascending), codes ^ form.sign_bit)


def test_infinity_saturates() -> None:
    infinite = torch.tensor([float("inf"), -float("inf")], dtype=torch.float64)
    assert decode(FP6_E3M2, encode(FP6_E3M2, infinite)).tolist() == [28.0, -28.0]
