"""Norms, rotary embedding, KV appending, SwiGLU and block copies equal their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import TYPES, assert_rounded
from trireme.kernels import cuda_elementwise as ops
from trireme.kernels import cuda_kv
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import Kernel, ShapeMismatch

EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare(
        Kernel(source=source, name=name)
        for source, names in {
            "rms_norm": [f"rms_norm<{kind}, {warps}>" for kind in TYPES for warps in (1, 8)],
            "rotary_append_kv": [f"rotary_append_kv<{kind}>" for kind in TYPES],
            "append_kv": [f"append_kv<{kind}>" for kind in TYPES],
            "swiglu": [f"swiglu<{kind}>" for kind in TYPES],
            "copy_blocks": ["copy_blocks"],
        }.items()
        for name in names
    )


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.complex(
        angles.cos(), angles.sin()
    )
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows, width", [(1, 8), (11, 72), (3, 1032), (2, 4096)])
def test_a_row_gets_unit_root_mean_square(emulator: Emulator, kind: str, rows: int, width: int) -> None:
    dtype = TYPES[kind]
    wide, weight = torch.randn(rows, 2 * width, dtype=dtype) * 3, torch.randn(width, dtype=dtype)
    x = wide[:, width:]  # rows lie further apart than they are wide
    assert_rounded(ops.rms_norm(emulator, x, weight, EPS), normalised(x, weight))


@pytest.mark.parametrize("kind", TYPES)
def test_each_head_has_a_norm_of_its_own(emulator: Emulator, kind: str) -> None:
    dtype = TYPES[kind]
    x, weight = torch.randn(5, 3, 64, dtype=dtype), torch.randn(3, 64, dtype=dtype)
    assert_rounded(ops.rms_norm(emulator, x, weight, EPS), normalised(x, weight))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows, width", [(9, 136), (2, 2048)])
def test_the_residual_grows_by_x_and_its_sum_is_normalised(
    emulator: Emulator, kind: str, rows: int, width: int
) -> None:
    dtype = TYPES[kind]
    x, residual, weight = (torch.randn(size, dtype=dtype) for size in ((rows, width), (rows, width), width))
    total = x + residual
    out = ops.add_rms_norm(emulator, x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert_rounded(out, normalised(total, weight))


def cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 16), (4, 2, 64), (3, 3, 96), (8, 1, 128)])
def test_queries_and_keys_turn_and_the_cache_takes_keys_and_values(
    emulator: Emulator, kind: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    dtype, tokens = TYPES[kind], 5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    quarter_turns = torch.randint(0, 4, (tokens, 1, head_dim // 2)).double() * torch.pi / 2
    cos, sin = cos_sin(quarter_turns, dtype)  # 0, 1 and -1 up to 1e-16: nothing is lost in cos and sin
    caches = torch.full((2, 4, 4, kv_heads, head_dim), 7.0, dtype=dtype)
    before = caches.clone()
    slots = torch.tensor([13, -1, 0, 15, 6])
    out = cuda_kv.rotary_append_kv(emulator, q, k, v, cos, sin, caches[0], caches[1], slots)
    assert_rounded(out, rotated(q, quarter_turns))
    written = slots >= 0
    flat = caches.view(2, 16, kv_heads, head_dim)
    assert_rounded(flat[0, slots[written]], rotated(k, quarter_turns)[written])
    assert torch.equal(flat[1, slots[written]], v[written])
    others = torch.ones(16, dtype=torch.bool).index_fill_(0, slots[written], False)
    assert torch.equal(flat[:, others], before.view_as(flat)[:, others])


@pytest.mark.parametrize("kind", TYPES)
def test_rotary_alone_turns_any_angle(emulator: Emulator, kind: str) -> None:
    dtype = TYPES[kind]
    x, angles = torch.randn(6, 5, 32, dtype=dtype), torch.rand(6, 1, 16, dtype=torch.float64) * 6
    cos, sin = cos_sin(angles, dtype)
    exact = x.double() * cos.double() + x.double().roll(16, -1) * sin.double()
    assert_rounded(cuda_kv.rotary(emulator, x, cos, sin), exact, slack=1.0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens, kv_heads, head_dim", [(1, 1, 8), (9, 3, 40), (5, 8, 128)])
def test_appending_writes_the_slots_and_nothing_else(
    emulator: Emulator, kind: str, tokens: int, kv_heads: int, head_dim: int
) -> None:
    dtype = TYPES[kind]
    both = torch.randn(tokens, 2 * kv_heads, head_dim, dtype=dtype)
    k, v = both.split(kv_heads, 1)
    caches = torch.randn(2, 3, 16, kv_heads, head_dim, dtype=dtype)
    expected = caches.clone()
    slots = torch.randperm(48)[:tokens]
    for cache, new in zip(expected, (k, v), strict=True):
        cache.view(48, kv_heads, head_dim).index_copy_(0, slots, new)
    cuda_kv.append_kv(emulator, k, v, caches[0], caches[1], slots)
    assert torch.equal(caches, expected)
    cuda_kv.append_kv(emulator, k, v, caches[0], caches[1], torch.full_like(slots, -1))
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens, width", [(1, 8), (7, 344), (3, 1000)])
def test_swiglu_gates_the_second_half_with_the_first(
    emulator: Emulator, kind: str, tokens: int, width: int
) -> None:
    gate_up = torch.randn(tokens, 2 * width, dtype=TYPES[kind]) * 4
    gate, up = gate_up.double().chunk(2, -1)
    assert_rounded(ops.swiglu(emulator, gate_up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("shape", [(8,), (4, 2, 24), (16, 3, 128)])
def test_blocks_are_gathered_and_scattered(emulator: Emulator, shape: tuple[int, ...]) -> None:
    pool = torch.randint(-100, 100, (7, *shape), dtype=torch.int16)
    blocks = torch.tensor([6, 0, 3])
    staging = torch.empty((3, *shape), dtype=torch.int16)
    cuda_kv.copy_blocks(emulator, pool, staging, source_blocks=blocks)
    assert torch.equal(staging, pool[blocks])
    other = torch.zeros_like(pool)
    cuda_kv.copy_blocks(emulator, staging, other, target_blocks=blocks.flip(0))
    assert torch.equal(other, torch.zeros_like(pool).index_copy_(0, blocks.flip(0), staging))
    both = torch.zeros_like(pool)
    cuda_kv.copy_blocks(emulator, pool, both, source_blocks=blocks, target_blocks=blocks)
    assert torch.equal(both, torch.zeros_like(pool).index_copy_(0, blocks, pool[blocks]))


def test_nothing_is_launched_for_no_tokens(emulator: Emulator) -> None:
    empty, weight = torch.empty(0, 64, dtype=torch.float16), torch.ones(64, dtype=torch.float16)
    assert ops.rms_norm(emulator, empty, weight, EPS).shape == (0, 64)
    assert ops.swiglu(emulator, empty).shape == (0, 32)


@pytest.mark.parametrize(
    "x, weight, message",
    [
        (torch.ones(2, 64), torch.ones(64), "x is of type torch.float32"),
        (torch.ones(2, 60).half(), torch.ones(60).half(), "the width of x is 60, no multiple of 8"),
        (torch.ones(2, 64).half(), torch.ones(32).half(), r"weight has shape \(32,\), not \('any', 64\)"),
        (torch.ones(2, 64).half(), torch.ones(64).bfloat16(), "weight is of type torch.bfloat16"),
        (torch.ones(64, 2).half().t(), torch.ones(64).half(), "the rows of x"),
        (
            torch.ones(2, 68).half()[:, 4:],
            torch.ones(64).half(),
            "the rows of x must start at multiples of 16",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    emulator: Emulator, x: Tensor, weight: Tensor, message: str
) -> None:
    with pytest.raises(ShapeMismatch, match=message):
        ops.rms_norm(emulator, x, weight, EPS)
