"""Products by wgmma equal float64 ones, and those by mma.sync bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cuda import test_low_bit_gemm
from tests.cuda.conftest import TYPES, Hopper
from tests.cuda.test_low_bit_gemm import FORMATS, assert_close, every_code, weight_of
from trireme.kernels.cuda_compile import UnsupportedGpu
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel, Launcher
from trireme.kernels.cuda_linear import WGMMA_TOKENS, low_bit_linear, wgmma_block, wgmma_kernel
from trireme.quant.device_layouts import DIRECT, pack_for_device
from trireme.quant.formats import weight_format
from trireme.quant.quantization import dequantize

KERNELS = [
    *(wgmma_block(kind, weight_format(name), 128).kernel for kind in TYPES for name in FORMATS),
    wgmma_kernel("bf16", weight_format("fp6_e3m2"), 64),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare(test_low_bit_gemm.KERNELS)
    emulator.prepare(KERNELS)


def among_nans(tokens: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Activations around which nothing must be read."""
    whole = torch.full((tokens + 2, inputs + 16), torch.nan, dtype=dtype)
    whole[1:-1, 8:-8] = torch.randn(tokens, inputs)
    return whole[1:-1, 8:-8]


def both(launcher: Hopper, *operands: Tensor, **options: int | None) -> Tensor:
    """The product by wgmma, which has the bits of that by mma.sync."""
    found = low_bit_linear(launcher, *operands, **options, uses_wgmma=True)  # type: ignore[arg-type]
    by_mma = low_bit_linear(launcher, *operands, **options, uses_wgmma=False)  # type: ignore[arg-type]
    assert torch.equal(found, by_mma)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_dequantized_weight_and_of_mma_bit_for_bit(
    hopper: Hopper, name: str
) -> None:
    packed, weight = weight_of(name, 70, 384)  # six tiles of columns: some turns have two
    x = among_nans(67, 384, torch.bfloat16)
    assert_close(both(hopper, x, packed), x, weight)


@pytest.mark.parametrize(
    "name, tokens, outputs, inputs, splits",
    [
        ("fp6_e3m2", 1, 64, 64, 1),
        ("fp6_e3m2", 64, 193, 128, 1),
        ("fp6_e3m2", 129, 200, 72, 1),
        ("int8_ch", 130, 3, 320, 2),
        ("int4_g32_zeros", 67, 130, 640, 3),
        ("fp5_e2m2", 9, 66, 72, 2),
    ],
)
def test_tokens_rows_and_columns_need_not_fill_a_block(
    hopper: Hopper, name: str, tokens: int, outputs: int, inputs: int, splits: int
) -> None:
    packed, weight = weight_of(name, outputs, inputs)
    x = among_nans(tokens, inputs, torch.bfloat16)
    assert_close(both(hopper, x, packed, splits=splits), x, weight)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "name", ["fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "int8_ch", "int4_g32", "int4_g32_zeros"]
)
def test_every_code_comes_out_exactly(hopper: Hopper, kind: str, name: str) -> None:
    weight = every_code(name)
    out = both(hopper, torch.eye(128, 64, dtype=TYPES[kind]), pack_for_device(weight, DIRECT))
    assert torch.equal(out[:64].t().double(), dequantize(weight, torch.float64))
    assert not out[64:].any()


@pytest.mark.parametrize("splits", [1, 2])
def test_bias_and_residual_are_added_before_rounding(hopper: Hopper, splits: int) -> None:
    packed, weight = weight_of("fp6_e3m2", 70, 576)
    x, bias, residual = (torch.randn(*size, dtype=torch.float16) for size in ((65, 576), (70,), (65, 70)))
    actual = both(hopper, x, packed, bias, residual, splits=splits)
    assert_close(actual, x, weight, bias.double() + residual.double())


class Noting:
    """A launcher that notes which kernels it launches."""

    multiprocessors = 4

    def __init__(self, launcher: Launcher, *, has_wgmma: bool) -> None:
        self._launcher = launcher
        self.has_wgmma = has_wgmma
        self.sources: list[str] = []

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        self.sources.append(kernel.source)
        self._launcher.launch(kernel, geometry, arguments)


def test_many_tokens_take_wgmma_where_there_is_some(hopper: Hopper) -> None:
    packed, _ = weight_of("fp6_e3m2", 64, 64)
    x = torch.randn(WGMMA_TOKENS, 64, dtype=torch.bfloat16)
    for has_wgmma in (False, True):
        noting = Noting(hopper, has_wgmma=has_wgmma)
        fewer, enough, again = (low_bit_linear(noting, each, packed) for each in (x[1:], x, x))
        special = "sm90_low_bit_gemm" if has_wgmma else "low_bit_gemm"
        # The first time it is held against the other.
        first = ["low_bit_gemm", "sm90_low_bit_gemm", special] if has_wgmma else ["low_bit_gemm"]
        assert noting.sources == ["low_bit_gemm", *first, special]
        assert torch.equal(enough[1:], fewer) and torch.equal(enough, again)


class Wrong(Noting):
    """A GPU whose wgmma does something else, once it is told so, or does nothing but fail."""

    fails = False

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        is_special = kernel.source == "sm90_low_bit_gemm"
        if is_special and self.fails:
            raise RuntimeError("no such instruction")
        super().launch(kernel, geometry, arguments)
        if is_special:
            out = next(each for each in arguments if isinstance(each, Tensor) and each.shape == (64, 64))
            out[3, 5] += 2 * out.abs().max()


@pytest.mark.parametrize("fails", [False, True])
def test_wgmma_is_not_used_where_it_is_wrong(
    hopper: Hopper, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    packed, weight = weight_of("fp6_e3m2", 64, 128)
    wrong = Wrong(hopper, has_wgmma=True)
    wrong.fails = fails
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    hidden = torch.where(torch.arange(64)[:, None] == 9, torch.nan, x)
    low_bit_linear(wrong, hidden, packed)  # what is no number shows nothing
    assert not caplog.records
    for _ in range(2):
        assert_close(low_bit_linear(wrong, x, packed), x, weight)
    assert [record.message for record in caplog.records] == ["kernel_not_used"]
    assert wrong.sources.count("sm90_low_bit_gemm") == (0 if fails else 1)


def test_nobody_reaches_wgmma_on_a_gpu_without_it(emulator: Emulator) -> None:
    packed, _ = weight_of("fp6_e3m2", 64, 64)
    with pytest.raises(UnsupportedGpu, match=r"wgmma takes a GPU of compute capability 9\.0"):
        low_bit_linear(emulator, torch.ones(64, 64).bfloat16(), packed, uses_wgmma=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_fits_shared_memory(name: str) -> None:
    """227 KiB of a multiprocessor of compute capability 9.0 are a block's, at most."""
    assert wgmma_block("bf16", weight_format(name), 128).shared_bytes <= 227 << 10
