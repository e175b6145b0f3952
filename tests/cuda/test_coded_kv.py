"""A cache of 8 bits holds what `kv_forms` encodes, and attention reads it as that decodes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_support import Step, assert_close
from tests.cuda.conftest import TYPES
from trireme.kernels import kv_forms
from trireme.kernels.cuda_attention import attention_kernel, merge_kernel
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_kv import append_coded_kernel, append_kv
from trireme.kernels.cuda_launch import CODE_NAMES, ShapeMismatch

HEAD_DIMS = (16, 128)


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    kernels = [append_coded_kernel(kind, code) for kind in TYPES for code in CODE_NAMES.values()]
    for kind in TYPES:
        for head_dim in HEAD_DIMS:
            kernels.append(merge_kernel(kind, head_dim))
            for row_warps in (1, 4):
                kernels += [attention_kernel(kind, head_dim, row_warps, code) for code in CODE_NAMES.values()]
    emulator.prepare(kernels)


def appended(emulator: Emulator, rows: Tensor, storage: torch.dtype) -> Tensor:
    """rows (tokens, kv_heads, head_dim) through a cache: what its slots hold then."""
    tokens, kv_heads, head_dim = rows.shape
    caches = torch.zeros(2, tokens + 2, 4, kv_heads, head_dim + 4, dtype=storage)
    slots = torch.randperm(4 * (tokens + 2))[:tokens]
    append_kv(emulator, rows, rows.flip(0), caches[0], caches[1], slots)
    flat = caches.view(2, -1, kv_heads, head_dim + 4)
    assert torch.equal(flat[1, slots], flat[0, slots].flip(0))
    others = torch.ones(flat.shape[1], dtype=torch.bool).index_fill_(0, slots, False)
    assert not flat[:, others].any()
    return flat[0, slots]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("storage", CODE_NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 2, 36), (5, 2, 128)])
def test_appending_encodes(
    emulator: Emulator, kind: str, storage: torch.dtype, shape: tuple[int, ...]
) -> None:
    rows = (torch.randn(shape) * torch.logspace(-4, 3, shape[0])[:, None, None]).to(TYPES[kind])
    rows[0, 0] = 0.0
    assert torch.equal(appended(emulator, rows, storage), kv_forms.encode(rows, storage))


@pytest.mark.parametrize("kind", TYPES)
def test_every_float_of_8_bits_is_written_and_ties_go_to_even(emulator: Emulator, kind: str) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    values = torch.cat((codes, between, -codes, -between, torch.tensor([448.0, -0.0])))
    rows = torch.nn.functional.pad(values, (0, -len(values) % 16), value=448.0).view(-1, 1, 16).clone()
    rows[:, 0, 15] = 448.0  # so that each row's scale is 1
    rows = rows.to(TYPES[kind])
    assert torch.equal(appended(emulator, rows, torch.uint8), kv_forms.encode(rows, torch.uint8))


@pytest.mark.parametrize("storage", CODE_NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_numbers_reads_back_as_none(
    emulator: Emulator, storage: torch.dtype, bad: float
) -> None:
    rows = torch.randn(2, 1, 16).bfloat16()
    rows[1, 0, 3] = bad
    stored = appended(emulator, rows, storage)
    assert kv_forms.decode(stored[1], torch.float32).isnan().all()
    assert torch.equal(stored[0], kv_forms.encode(rows[0], storage))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("storage", CODE_NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_decodes(emulator: Emulator, kind: str, storage: torch.dtype, head_dim: int) -> None:
    step = Step(
        lengths=(1, 1, 9),
        contexts=(1, 150, 40),
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        dtype=TYPES[kind],
        storage=storage,
    )
    assert_close(step.run(emulator), step.expected())
    assert_close(step.run(emulator, window=20), step.expected(window=20))


def test_another_row_is_refused(emulator: Emulator) -> None:
    rows, slots = torch.zeros(1, 1, 16).half(), torch.zeros(1, dtype=torch.int64)
    caches = torch.zeros(2, 1, 4, 1, 16, dtype=torch.int8)
    with pytest.raises(ShapeMismatch, match=r"k_cache has shape \(1, 4, 1, 16\), not \(1, 4, 1, 20\)"):
        append_kv(emulator, rows, rows, caches[0], caches[1], slots)
