"""Weights in pinned host memory: embeddings equal `index_select` bit for bit, products equal float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import TYPES
from trireme.kernels import cuda_host_memory, cuda_ops, ops
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_host_memory import GATHER_ROWS, TOKENS_IN_PLACE, embedding, gemv_kernel, linear
from trireme.kernels.cuda_launch import ShapeMismatch
from trireme.kernels.cuda_linear import gemm_kernel
from trireme.quant.device_layouts import DIRECT, pack_for_device
from trireme.quant.formats import weight_format
from trireme.quant.quantization import dequantize, quantize

ELSEWHERE = torch.device("meta")
"""Stands for a GPU where only the way to a kernel is tested."""


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare(
        [GATHER_ROWS, *(gemv_kernel(kind, tokens) for kind in TYPES for tokens in (1, 2, 4, 8))]
        + [gemm_kernel("bf16", weight_format("fp6_e2m3"), tile) for tile in (8, 16)]
    )


def exact_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In float64, and what the sums' rounding may make of it."""
    exact = x.double() @ weight.double().t()
    allowed = x.double().abs() @ weight.double().abs().t() * 2.0**-20
    for added in (bias, residual):
        exact = exact if added is None else exact + added.double()
    return exact, allowed + exact.abs() * torch.finfo(x.dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, width", [(7, 8), (30, 1032), (5, 4104)])
def test_an_embedding_is_a_row_of_the_table(
    emulator: Emulator, dtype: torch.dtype, rows: int, width: int
) -> None:
    table = torch.randn(rows, width).to(dtype)
    indices = torch.tensor([rows - 1, 0, 3, 3, rows // 2])
    assert torch.equal(embedding(emulator, table, indices), table[indices])
    assert embedding(emulator, table, indices[:0]).shape == (0, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_index_out_of_range_reads_nothing_and_gives_nan(emulator: Emulator, dtype: torch.dtype) -> None:
    table = torch.randn(6, 16).to(dtype)
    out = embedding(emulator, table, torch.tensor([5, 6, -1, 1 << 60, 0]))
    assert torch.equal(out[[0, 4]], table[[5, 0]])
    assert bool(out[1:4].isnan().all())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("outputs, inputs", [(1, 8), (5, 264), (66, 1160)])
@pytest.mark.parametrize("has_more", [False, True])
def test_a_product_is_that_of_float64(
    emulator: Emulator, kind: str, tokens: int, outputs: int, inputs: int, has_more: bool
) -> None:
    dtype = TYPES[kind]
    x = torch.randn(tokens, 2 * inputs, dtype=dtype)[:, inputs:]  # rows lie further apart than they are wide
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if has_more else None
    residual = torch.randn(tokens, outputs, dtype=dtype) if has_more else None
    out = linear(emulator, x, weight, bias, residual)
    exact, allowed = exact_product(x, weight, bias, residual)
    assert out.dtype == dtype
    assert float(((out.double() - exact).abs() / allowed).max()) < 1.0


def test_a_tokens_bits_do_not_depend_on_the_others(emulator: Emulator) -> None:
    x, weight = torch.randn(8, 1160).bfloat16(), torch.randn(9, 1160).bfloat16()
    together = linear(emulator, x, weight)
    for tokens in (slice(0, 1), slice(7, 8), slice(2, 4), slice(1, 6)):
        assert torch.equal(linear(emulator, x[tokens], weight), together[tokens])


def test_more_tokens_than_are_worth_it_are_multiplied_after_a_copy(emulator: Emulator) -> None:
    x, weight = torch.randn(TOKENS_IN_PLACE + 1, 64), torch.randn(5, 64)
    bias, residual = torch.randn(5), torch.randn(TOKENS_IN_PLACE + 1, 5)
    wanted = x.double() @ weight.double().t() + bias.double() + residual.double()
    out = linear(emulator, x, weight, bias, residual)  # float32, which no kernel takes
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    assert linear(emulator, x[:0].bfloat16(), weight.bfloat16()).shape == (0, 5)


@pytest.mark.parametrize("tokens", [3, 9])
def test_codes_of_few_bits_are_read_in_place_too(emulator: Emulator, tokens: int) -> None:
    quantized = quantize(torch.randn(70, 128), weight_format("fp6_e2m3"))
    x = torch.randn(tokens, 128).bfloat16()
    exact, allowed = exact_product(x, dequantize(quantized, torch.float64), None, None)
    out = linear(emulator, x, pack_for_device(quantized, DIRECT))
    assert float(((out.double() - exact).abs() / allowed).max()) < 1.0


def test_ops_go_to_the_host_where_a_weight_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(cuda_ops, "launcher_of", lambda device: device)
    monkeypatch.setattr(cuda_host_memory, "embedding", lambda *given: calls.append(given))
    monkeypatch.setattr(cuda_host_memory, "linear", lambda *given: calls.append(given))
    x, indices = torch.empty(2, 64, device=ELSEWHERE), torch.empty(2, dtype=torch.int64, device=ELSEWHERE)
    weight, residual = torch.randn(5, 64), torch.empty(2, 5, device=ELSEWHERE)
    packed = pack_for_device(quantize(weight, weight_format("int8_ch")), DIRECT)
    ops.embedding(weight, indices)
    ops.linear(x, weight)
    ops.linear_add(x, weight, residual)
    ops.linear(x, packed)
    ops.linear_add(x, packed, residual)
    assert [call[0] for call in calls] == [ELSEWHERE] * 5
    assert [call[1] is x for call in calls] == [False, True, True, True, True]
    assert [call[2] is packed for call in calls[1:]] == [False, False, True, True]
    assert torch.equal(ops.embedding(weight, torch.tensor([4, 0])), weight[[4, 0]])


def test_what_the_gpu_cannot_read_is_refused(emulator: Emulator) -> None:
    indices, table = torch.tensor([0], device=ELSEWHERE), torch.zeros(4, 8)
    with pytest.raises(ShapeMismatch, match="table is on cpu, not meta, and not in pinned memory; pin it"):
        embedding(emulator, table, indices)
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=ELSEWHERE)
    with pytest.raises(ShapeMismatch, match="weight is on cpu, not meta, and not in pinned memory"):
        linear(emulator, x, torch.zeros(4, 64).bfloat16())
    packed = pack_for_device(quantize(torch.randn(64, 64), weight_format("int8_ch")), DIRECT)
    with pytest.raises(ShapeMismatch, match=r"weight\.words is on cpu, not meta, and not in pinned memory"):
        linear(emulator, x, replace(packed, words=packed.words))
    with pytest.raises(ShapeMismatch, match="the number of bytes of a row of the table is 12"):
        embedding(emulator, torch.zeros(4, 3), torch.tensor([0]))
    with pytest.raises(ShapeMismatch, match=r"x is of type torch\.float32; CUDA kernels take"):
        linear(emulator, torch.zeros(1, 64), torch.zeros(4, 64))
    with pytest.raises(ShapeMismatch, match="x has 12 inputs"):
        linear(emulator, torch.zeros(1, 12).half(), torch.zeros(4, 12).half())
    with pytest.raises(ShapeMismatch, match=r"weight is of type torch\.bfloat16, not torch\.float16"):
        linear(emulator, torch.zeros(1, 64).half(), torch.zeros(4, 64).bfloat16())
