"""Weights to codes and scales: against a plain reference, by properties, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.quant import quantization
from trireme.quant.formats import FORMATS, WeightFormat, weight_format
from trireme.quant.minifloat_codes import values_of
from trireme.quant.quantization import QuantizedWeight, dequantize, quantize
from trireme.quant.weight_error import pooled, weight_error

ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
PER_ROW = pytest.mark.parametrize(
    "form", [form for form in FORMATS.values() if form.group_size is None], ids=lambda form: form.name
)
IN_CHANNELS = 256
unhurried = settings(deadline=None, max_examples=40)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(rows, 256) of any magnitude that float32 has, with rows of zeros and of single weights among them."""
    seed = draw(st.integers(0, 2**32))
    rows = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, IN_CHANNELS), generator=generator)
    weight *= torch.tensor(draw(st.lists(st.floats(1e-30, 1e30), min_size=rows, max_size=rows)))[:, None]
    if draw(st.booleans()):
        weight[0] = 0
    if draw(st.booleans()):
        weight[-1, 1:] = 0
    if draw(st.booleans()):
        weight = weight.abs()
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def steps_at(quantized: QuantizedWeight, weight: Tensor) -> Tensor:
    """The distance of the two values that each weight lies between, in the weight's unit."""
    form = quantized.form
    scale = quantized.scales.double().view(len(weight), -1)
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    if form.minifloat is None:
        return scale.abs()
    magnitudes = values_of(form.minifloat)[: form.minifloat.sign_bit]
    above = torch.searchsorted(magnitudes, (weight.double() / scale).abs()).clamp(1, len(magnitudes) - 1)
    return (magnitudes[above] - magnitudes[above - 1]) * scale


@ALL
@unhurried
@given(weight=weights())
def test_no_weight_moves_by_more_than_half_a_step(form: WeightFormat, weight: Tensor) -> None:
    quantized = quantize(weight, form)
    difference = (dequantize(quantized, torch.float64) - weight.double()).abs()
    # The last bit of a float32 scale, times the largest code, is what may come on top.
    assert (difference <= steps_at(quantized, weight) * (0.5 + 2**-16)).all()


@ALL
@unhurried
@given(weight=weights())
def test_what_is_quantized_once_quantizes_to_the_same_codes(form: WeightFormat, weight: Tensor) -> None:
    once = quantize(weight, form)
    twice = quantize(dequantize(once), form)
    assert torch.equal(once.codes, twice.codes)
    torch.testing.assert_close(once.scales, twice.scales, rtol=1e-6, atol=0)
    assert once.zeros is None or (twice.zeros is not None and torch.equal(once.zeros, twice.zeros))


@ALL
@unhurried
@given(weight=weights())
def test_order_within_a_group_is_kept(form: WeightFormat, weight: Tensor) -> None:
    size = form.group_size or IN_CHANNELS
    ascending = weight.view(len(weight), -1, size).sort(-1).values.view_as(weight)
    values = dequantize(quantize(ascending, form), torch.float64).view(len(weight), -1, size)
    assert (values.diff(dim=-1) >= 0).all()


@ALL
@unhurried
@given(weight=weights(), exponent=st.integers(-6, 6))
def test_rows_are_independent_and_powers_of_two_only_scale(
    form: WeightFormat, weight: Tensor, exponent: int
) -> None:
    quantized = quantize(weight, form)
    flipped = quantize(weight.flip(0) * 2.0**exponent, form)
    assert torch.equal(flipped.codes.flip(0), quantized.codes)
    is_zero = (weight == 0).all(1)
    wanted = quantized.scales * 2.0**exponent
    assert torch.equal(flipped.scales.flip(0)[~is_zero], wanted[~is_zero]) or form.group_size


@PER_ROW
@unhurried
@given(weight=weights())
def test_signs_mirror(form: WeightFormat, weight: Tensor) -> None:
    assert torch.equal(dequantize(quantize(-weight, form)), -dequantize(quantize(weight, form)))


@ALL
def test_how_a_matrix_lies_in_memory_does_not_matter(form: WeightFormat) -> None:
    weight = torch.randn((128, 5), generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize(weight.T, form).codes, quantize(weight.T.contiguous(), form).codes)


def test_int8_by_head() -> None:
    quantized = quantize(torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 3.49]]), weight_format("int8_ch"))
    assert quantized.scales.tolist() == [1.0]
    assert quantized.codes.tolist() == [[255, 1, 128, 130, 126, 131]]


def test_int4_by_head() -> None:
    weight = torch.zeros(1, 128)
    weight[0, :5] = torch.tensor([-8.0, 7.0, 0.5, 1.5, -6.4])
    weight[0, 32:35] = torch.tensor([16.0, -14.0, 3.2])
    weight[0, 64:66] = torch.tensor([7.5, -7.5])
    quantized = quantize(weight, weight_format("int4_g32"))
    assert quantized.scales.tolist() == [[1.0, -2.0, 1.0, 1.0]]
    assert quantized.codes[0, :6].tolist() == [0, 15, 8, 10, 2, 8]
    assert quantized.codes[0, 32:36].tolist() == [0, 15, 6, 8]
    assert quantized.codes[0, 64:67].tolist() == [15, 0, 8]


def test_int4_with_zero_points_by_head() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-5.0, 10.0, 2.4, -0.6])
    quantized = quantize(weight, weight_format("int4_g32_zeros"))
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.zeros is not None and quantized.zeros.tolist() == [[5]]
    assert quantized.codes[0, :5].tolist() == [0, 15, 7, 4, 5]


def test_fp6_by_head() -> None:
    quantized = quantize(torch.tensor([[28.0, -28.0, 0.03125, 0.04, 9.0, 11.0]]), weight_format("fp6_e3m2"))
    assert quantized.scales.tolist() == [1.0]
    assert dequantize(quantized).tolist() == [[28.0, -28.0, 0.0, 0.0625, 8.0, 12.0]]


@ALL
def test_zeros_stay_zeros_with_scale_one(form: WeightFormat) -> None:
    quantized = quantize(torch.zeros(2, 128), form)
    assert (quantized.scales == 1).all()
    assert (dequantize(quantized) == 0).all()
    assert weight_error(torch.zeros(2, 128), quantized).relative_frobenius == 0.0


@ALL
def test_the_ends_of_float32_are_no_trap(form: WeightFormat) -> None:
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    weight = torch.zeros(2, 128)
    weight[0, ::2], weight[0, 1::2], weight[1] = largest, -largest, least
    quantized = quantize(weight, form)
    assert quantized.scales.isfinite().all() and (quantized.scales != 0).all()
    assert form.has_signed_scales or (quantized.scales > 0).all()
    assert dequantize(quantized, torch.float64).isfinite().all()
    assert float(dequantize(quantized, torch.float64)[0, 0]) == pytest.approx(largest, rel=0.07)


@ALL
def test_blocks_of_rows_change_nothing(form: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 128, generator=torch.Generator().manual_seed(1))
    whole, error = quantize(weight, form), weight_error(weight, quantize(weight, form))
    monkeypatch.setattr(quantization, "_BLOCK_ELEMENTS", 3 * 128)
    parts = quantize(weight, form)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
    assert torch.equal(dequantize(whole), dequantize(parts))
    assert weight_error(weight, parts).squared_error == pytest.approx(error.squared_error, rel=1e-12)


def test_error_figures_are_those_of_the_definition() -> None:
    weight = torch.tensor([[127.0, 0.25, -0.5, 3.0]])
    error = weight_error(weight, quantize(weight, weight_format("int8_ch")))
    assert error.max_abs == 0.5
    assert error.relative_frobenius == pytest.approx(
        math.hypot(0.25, 0.5) / math.hypot(127, 0.25, 0.5, 3), rel=1e-12
    )
    both = pooled([error, error])
    assert both.elements == 8 and both.max_abs == 0.5
    assert both.relative_frobenius == pytest.approx(error.relative_frobenius, rel=1e-12)


@ALL
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused_by_its_place(form: WeightFormat, value: float) -> None:
    weight = torch.ones(3, 128)
    weight[2, 77] = value
    with pytest.raises(InvalidCheckpoint, match=r"layer\.3\[2, 77\] is -?(nan|inf)"):
        quantize(weight, form, name="layer.3")


@pytest.mark.parametrize(
    "weight, words",
    [
        (torch.ones(4), "shape"),
        (torch.ones(2, 64, 64), "shape"),
        (torch.ones(0, 64), "non-empty"),
        (torch.ones(3, 96), "group size 64"),
        (torch.ones(2, 64, dtype=torch.float64), "float64"),
        (torch.ones(2, 64, dtype=torch.int32), "int32"),
    ],
)
def test_odd_matrices_are_refused(weight: Tensor, words: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=words):
        quantize(weight, weight_format("int4_g64"))


def test_an_unknown_format_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidConfiguration, match=r"fp6_e3m2.*int4_g128_zeros"):
        weight_format("fp3")
