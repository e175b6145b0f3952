"""Products with low-bit weights equal float64 products with the dequantized ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import TYPES
from trireme.errors import InvalidCheckpoint
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import ShapeMismatch
from trireme.kernels.cuda_linear import TOKEN_TILES, gemm_kernel, low_bit_linear, splits_for, takes
from trireme.quant.device_layouts import DIRECT, INTERLEAVED, PackedWeight, pack_for_device
from trireme.quant.formats import WeightFormat, weight_format
from trireme.quant.quantization import QuantizedWeight, dequantize, quantize

FORMATS = (
    "fp6_e3m2",
    "fp6_e2m3",
    "fp5_e2m2",
    "int8_ch",
    "int4_g32",
    "int4_g64",
    "int4_g128",
    "int4_g32_zeros",
    "int4_g64_zeros",
    "int4_g128_zeros",
)
KERNELS = [
    gemm_kernel(kind, weight_format(name), tile) for kind in TYPES for name in FORMATS for tile in TOKEN_TILES
]


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare(KERNELS)


def weight_of(name: str, outputs: int, inputs: int) -> tuple[PackedWeight, Tensor]:
    """A random weight as kernels take it, and its float64 values."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    values = torch.randn(outputs, inputs, generator=generator) + 0.3
    quantized = quantize(values, weight_format(name))
    return pack_for_device(quantized, DIRECT), dequantize(quantized, torch.float64)


def every_code(name: str) -> QuantizedWeight:
    """All codes of a format, at all places of a tile."""
    form = weight_format(name)
    codes = torch.arange(64 * 64).view(64, 64) * 37 % (1 << form.bits)
    groups = form.groups(64)
    zeros = torch.arange(64 * groups).view(64, groups).to(torch.uint8) % 16 if form.has_zeros else None
    scales = torch.ones(64) if form.group_size is None else torch.ones(64, groups)
    if form.has_signed_scales:
        scales[::2] = -1.0
    return QuantizedWeight(form=form, codes=codes.to(torch.uint8), scales=scales, zeros=zeros)


def assert_close(actual: Tensor, x: Tensor, weight: Tensor, added: Tensor | float = 0.0) -> None:
    """Rounded once, after float32 sums whose error is some steps of the sum of magnitudes."""
    exact = x.double() @ weight.t() + added
    magnitude = x.double().abs() @ weight.abs().t() + abs(added)
    allowed = exact.abs() * torch.finfo(actual.dtype).eps / 2 + magnitude * 2.0**-20
    wrong = (actual.double() - exact).abs() / allowed
    assert actual.shape == exact.shape
    assert float(wrong.max()) < 1.0, f"{float(wrong.max())} times what rounding explains"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "tokens, outputs, inputs, splits",
    [(1, 64, 128, 1), (8, 70, 384, 1), (9, 130, 640, 2), (17, 3, 256, 1), (45, 66, 1152, 3)],
)
def test_a_product_is_that_of_the_dequantized_weight(
    emulator: Emulator, kind: str, name: str, tokens: int, outputs: int, inputs: int, splits: int
) -> None:
    packed, weight = weight_of(name, outputs, inputs)
    x = torch.randn(tokens, 2 * inputs, dtype=TYPES[kind])[:, inputs:]
    assert_close(low_bit_linear(emulator, x, packed, splits=splits), x, weight)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["fp6_e3m2", "int8_ch"])
def test_inputs_need_not_fill_a_tile(emulator: Emulator, kind: str, name: str) -> None:
    packed, weight = weight_of(name, 20, 72)
    x = torch.randn(5, 72, dtype=TYPES[kind])
    assert_close(low_bit_linear(emulator, x, packed), x, weight)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "name", ["fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "int8_ch", "int4_g32", "int4_g32_zeros"]
)
def test_every_code_comes_out_exactly(emulator: Emulator, kind: str, name: str) -> None:
    """One-hot tokens read single weights."""
    weight = every_code(name)
    packed = pack_for_device(weight, DIRECT)
    out = low_bit_linear(emulator, torch.eye(64, dtype=TYPES[kind]), packed)
    assert torch.equal(out.t().double(), dequantize(weight, torch.float64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("splits", [1, 2])
def test_bias_and_residual_are_added_before_rounding(emulator: Emulator, kind: str, splits: int) -> None:
    dtype = TYPES[kind]
    packed, weight = weight_of("fp6_e3m2", 70, 576)
    x, bias, residual = (torch.randn(*size, dtype=dtype) for size in ((9, 576), (70,), (9, 70)))
    actual = low_bit_linear(emulator, x, packed, bias, residual, splits=splits)
    assert_close(actual, x, weight, bias.double() + residual.double())


@pytest.mark.parametrize("name", ["fp6_e3m2", "int4_g32"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_tokens_bits_do_not_depend_on_the_others(emulator: Emulator, name: str, splits: int) -> None:
    packed, _ = weight_of(name, 64, 1024)
    x = torch.randn(40, 1024, dtype=torch.bfloat16)
    together = low_bit_linear(emulator, x, packed, splits=splits)
    for tokens in (slice(0, 1), slice(39, 40), slice(3, 15), slice(10, 34)):
        assert torch.equal(low_bit_linear(emulator, x[tokens], packed, splits=splits), together[tokens])


@pytest.mark.parametrize("name", ["fp6_e3m2", "fp6_e2m3", "fp5_e2m2"])
def test_large_activations_and_scales_of_any_size_do_not_overflow(emulator: Emulator, name: str) -> None:
    values = torch.randn(64, 128) * torch.logspace(-6, 4, 64)[:, None]
    quantized = quantize(values, weight_format(name))
    packed, weight = pack_for_device(quantized, DIRECT), dequantize(quantized, torch.float64)
    x = torch.randn(3, 128, dtype=torch.bfloat16) * 1e4
    assert_close(low_bit_linear(emulator, x, packed), x, weight)


def test_splits_keep_the_device_busy_and_warps_fed() -> None:
    assert splits_for(8192, 8192, multiprocessors=132) == 3
    assert splits_for(64, 64, multiprocessors=132) == 1
    assert splits_for(256, 4096, multiprocessors=132) == 8
    assert splits_for(65536, 4096, multiprocessors=132) == 1


def test_what_the_kernel_does_not_take_is_refused(emulator: Emulator) -> None:
    packed, _ = weight_of("fp6_e3m2", 64, 128)
    with pytest.raises(ShapeMismatch, match=r"x has shape \(2, 64\), not \(2, 128\)"):
        low_bit_linear(emulator, torch.ones(2, 64).half(), packed)
    with pytest.raises(ShapeMismatch, match=r"x is of type torch\.float32"):
        low_bit_linear(emulator, torch.ones(2, 128), packed)
    odd, _ = weight_of("fp6_e3m2", 64, 100)
    with pytest.raises(ShapeMismatch, match="x has 100 inputs"):
        low_bit_linear(emulator, torch.ones(2, 100).half(), odd)
    e2m3 = quantize(torch.randn(64, 64), weight_format("fp6_e2m3"))
    with pytest.raises(InvalidCheckpoint, match="layout interleaved_v1 has no CUDA kernel"):
        low_bit_linear(emulator, torch.ones(2, 64).half(), pack_for_device(e2m3, INTERLEAVED))
    int3 = WeightFormat(name="int3_ch", bits=3)
    assert not takes(int3)
    with pytest.raises(InvalidCheckpoint, match="there is no CUDA kernel for int3_ch"):
        gemm_kernel("f16", int3, 8)
