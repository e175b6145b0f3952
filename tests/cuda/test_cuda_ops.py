"""`cuda_ops` stands in for `kernels.ops`: the same signatures, the same answers, whatever the type."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from trireme.kernels import cuda_ops, ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_emulator import Emulator
from trireme.quant.formats import WeightFormat, weight_format
from trireme.quant.quantization import dequantize, quantize

OPERATORS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "swiglu",
    "activation",
    "linear",
    "linear_add",
    "choose_experts",
    "append_kv",
    "paged_attention",
)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_the_emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "launcher_of", lambda device: emulator)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    tolerance = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_are_those_of_ops(name: str) -> None:
    parameters = [
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
        for module in (cuda_ops, ops)
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [64, 20])
def test_rows_are_normalised_alike(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(3, 2, width, dtype=dtype), torch.randn(2, width, dtype=dtype)
    assert_same(cuda_ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x.double(), weight.double(), 1e-5).to(dtype))
    assert_same(
        cuda_ops.rms_norm(x, weight[0], 1e-5), ops.rms_norm(x.double(), weight[0].double(), 1e-5).to(dtype)
    )
    bias = torch.randn(width, dtype=dtype)
    expected = ops.layer_norm(x.double(), weight[0].double(), bias.double(), 1e-5)
    assert_same(cuda_ops.layer_norm(x, weight[0], bias, 1e-5), expected.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [32, 24])
def test_heads_are_rotated_alike(dtype: torch.dtype, head_dim: int) -> None:
    x = torch.randn(4, 3, head_dim, dtype=dtype)
    cos, sin = torch.rand(2, 4, 1, head_dim, dtype=dtype)
    expected = ops.rotary(x.double(), cos.double(), sin.double()).to(dtype)
    assert_same(cuda_ops.rotary(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [16, 10])
def test_gates_and_products_are_alike(dtype: torch.dtype, width: int) -> None:
    gate_up = torch.randn(5, 2 * width, dtype=dtype)
    assert_same(cuda_ops.swiglu(gate_up), ops.swiglu(gate_up.double()).to(dtype))
    assert_same(cuda_ops.activation(gate_up, "gelu"), ops.activation(gate_up.double(), "gelu").to(dtype))
    weight, bias = torch.randn(6, 2 * width, dtype=dtype), torch.randn(6, dtype=dtype)
    residual = torch.randn(5, 6, dtype=dtype)
    torch.testing.assert_close(cuda_ops.linear(gate_up, weight, bias), ops.linear(gate_up, weight, bias))
    expected = ops.linear_add(gate_up, weight, residual, bias)
    torch.testing.assert_close(cuda_ops.linear_add(gate_up, weight, residual, bias), expected)


@pytest.mark.parametrize("name", ["fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "int4_g32_zeros"])
def test_products_with_few_bits_are_alike(name: str) -> None:
    weight = quantize(torch.randn(70, 96), weight_format(name))
    assert cuda_ops.takes_quantized(weight.form, torch.device("cuda"), torch.bfloat16)
    packed = cuda_ops.pack_quantized(weight, device=torch.device("cpu"))
    x, bias, residual = (torch.randn(*size, dtype=torch.bfloat16) for size in ((5, 96), (70,), (5, 70)))
    exact = x.double() @ dequantize(weight, torch.float64).t() + bias.double()
    assert_same(cuda_ops.linear(x, packed, bias), exact.bfloat16())
    assert_same(cuda_ops.linear_add(x, packed, residual, bias), (exact + residual.double()).bfloat16())


def test_what_has_no_kernel_is_not_taken() -> None:
    gpu, int3 = torch.device("cuda"), WeightFormat(name="int3_ch", bits=3)
    assert not cuda_ops.takes_quantized(int3, gpu, torch.bfloat16)
    assert not cuda_ops.takes_quantized(weight_format("fp6_e3m2"), gpu, torch.float32)
    assert not cuda_ops.takes_quantized(weight_format("fp6_e3m2"), torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [64, 24])
@pytest.mark.parametrize("window, cap", [(None, None), (9, None), (None, 0.5)])
def test_keys_are_appended_and_attended_to_alike(
    dtype: torch.dtype, head_dim: int, window: int | None, cap: float | None
) -> None:
    lengths, contexts, kv_heads = (1, 1, 6), (20, 1, 11), 2
    tables = np.random.default_rng(1).permutation(12).reshape(3, 4).astype(np.int64)
    batch = AttentionBatch(
        query_lens=lengths,
        context_lens=contexts,
        block_tables=tables,
        block_size=8,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    caches = torch.randn(2, 12, 8, kv_heads, head_dim, dtype=dtype)
    k, v = torch.randn(2, 8, kv_heads, head_dim, dtype=dtype)
    q = torch.randn(8, 4, head_dim, dtype=dtype)
    expected_caches = caches.clone()
    ops.append_kv(k, v, expected_caches[0], expected_caches[1], batch.slots)
    cuda_ops.append_kv(k, v, caches[0], caches[1], batch.slots)
    assert torch.equal(caches, expected_caches)
    kinds = {"scale": 0.125, "window": window, "cap": cap}
    actual = cuda_ops.paged_attention(q, caches[0], caches[1], batch, **kinds)
    exact = AttentionBatch(
        query_lens=lengths,
        context_lens=contexts,
        block_tables=tables,
        block_size=8,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    wide = caches.double()
    expected = ops.paged_attention(q.double(), wide[0], wide[1], exact, **kinds)
    assert_same(actual, expected.to(dtype))


def test_a_cpu_has_no_cuda_kernels() -> None:
    assert not cuda_ops.is_available(torch.device("cpu"))
