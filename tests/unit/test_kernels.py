"""Operators: each equals its definition, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.kernels import ops
from trireme.kernels.attention_batch import AttentionBatch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rms_norm_scales_to_unit_root_mean_square() -> None:
    x, weight = torch.randn(5, 3, 8), torch.randn(3, 8)
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt().float()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected * weight)
    torch.testing.assert_close(ops.rms_norm(x, weight[0], 1e-5), expected * weight[0])


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x, angles = torch.randn(4, 3, 8), torch.randn(4, 1, 4)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    expected = torch.cat((turned.real, turned.imag), -1)
    actual = ops.rotary(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    torch.testing.assert_close(actual, expected)


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    gate, up = torch.randn(3, 6), torch.randn(3, 6)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(ops.swiglu(torch.cat((gate, up), -1)), expected)


def test_linear_add_adds_the_residual_once() -> None:
    x, weight, bias, residual = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(3, 5)
    kept = residual.clone()
    torch.testing.assert_close(ops.linear_add(x, weight, residual), x @ weight.t() + kept)
    torch.testing.assert_close(ops.linear_add(x, weight, residual, bias), x @ weight.t() + bias + kept)
    torch.testing.assert_close(residual, kept)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_multiplies_like_a_plain_one(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    bias, residual = torch.randn(40, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    packed, kept = ops.pack_weight(weight), residual.clone()
    atol, rtol = (1e-5, 1e-5) if dtype is torch.float32 else (0.1, 0.05)
    plain = x @ weight.t()
    torch.testing.assert_close(ops.linear(x, packed), plain, atol=atol, rtol=rtol)
    torch.testing.assert_close(ops.linear(x, packed, bias), plain + bias, atol=atol, rtol=rtol)
    torch.testing.assert_close(ops.linear_add(x, packed, residual), plain + residual, atol=atol, rtol=rtol)
    torch.testing.assert_close(
        ops.linear_add(x, packed, residual, bias), plain + bias + residual, atol=atol, rtol=rtol
    )
    torch.testing.assert_close(residual, kept)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_paged_attention_equals_dense_attention_per_sequence(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([4, 8]))
    kv_heads = data.draw(st.sampled_from([1, 2]))
    heads = kv_heads * data.draw(st.sampled_from([1, 3]))
    window = data.draw(st.sampled_from([None, 1, 5, 16]))
    decodes = data.draw(st.lists(st.integers(1, 300), max_size=5))
    chunks = data.draw(st.lists(st.tuples(st.integers(2, 20), st.integers(0, 130)), max_size=5))
    if not decodes and not chunks:
        decodes = [1]
    query_lens = [1] * len(decodes) + [length for length, _ in chunks]
    context_lens = decodes + [length + before for length, before in chunks]
    head_dim = 8
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))

    widths = [-(-context // block_size) for context in context_lens]
    num_blocks = sum(widths) + 2
    is_run = data.draw(st.booleans())  # blocks in order may be read in place
    order = (
        list(range(num_blocks))[::-1] if is_run else torch.randperm(num_blocks, generator=generator).tolist()
    )
    tables = np.zeros((len(widths), max(widths)), dtype=np.int64)
    for row, width in enumerate(widths):
        tables[row, :width] = [order.pop() for _ in range(width)]
    k_cache = torch.randn(num_blocks, block_size, kv_heads, head_dim, generator=generator)
    v_cache = torch.randn(num_blocks, block_size, kv_heads, head_dim, generator=generator)
    q = torch.randn(sum(query_lens), heads, head_dim, generator=generator)
    k_new = torch.randn(sum(query_lens), kv_heads, head_dim, generator=generator)
    v_new = torch.randn(sum(query_lens), kv_heads, head_dim, generator=generator)
    batch = AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        block_size=block_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    ops.append_kv(k_new, v_new, k_cache, v_cache, batch.slots)
    actual = ops.paged_attention(q, k_cache, v_cache, batch, scale=0.4, window=window)

    row = 0
    for index, (length, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = tables[index, : widths[index]]
        k = k_cache[blocks].reshape(-1, kv_heads, head_dim)[:context]
        v = v_cache[blocks].reshape(-1, kv_heads, head_dim)[:context]
        torch.testing.assert_close(k[context - length :], k_new[row : row + length])
        for position in range(context - length, context):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = k[first : position + 1, shared] @ q[row, head] * 0.4
                expected = scores.softmax(0) @ v[first : position + 1, shared]
                got = actual[row, head * head_dim : (head + 1) * head_dim]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
            row += 1
    assert not math.isnan(actual.sum().item())
