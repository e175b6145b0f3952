"""KV in bfloat16 and in 8 bits: how far it is off, that it moves as bytes, and that it changes no rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.unit.engine_support import (
    answer,
    greedy,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from trireme.engine import Engine
from trireme.engine.kv_memory import KvMemory, block_bytes
from trireme.engine.kv_rotation import turn
from trireme.errors import InvalidConfiguration
from trireme.kernels import ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.kv_forms import KV_DTYPES, decode, encode, kv_form
from trireme.kvcache.block_identity import block_hashes
from trireme.models.model import Model

CODED = ("int8", "fp8")
STORED = ("bf16", *CODED)


pytestmark = pytest.mark.usefixtures("one_thread")


def storage_of(kv_dtype: str) -> torch.dtype:
    return kv_form(kv_dtype, torch.float32).storage


def float8_values() -> NDArray[np.float64]:
    """Finite values of float8_e4m3fn from 0 up, by definition: 4 exponent bits, bias 7, 3 mantissa bits."""
    values = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    values += [(1 + mantissa / 8) * 2.0 ** (field - 7) for field in range(1, 16) for mantissa in range(8)]
    return np.array(values[:-1])  # all ones is NaN


@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30), kv_dtype=st.sampled_from(CODED))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_row_is_rounded_to_the_nearest_codes_of_its_own_scale(
    seed: int, exponent: int, kv_dtype: str
) -> None:
    rows = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    stored = encode(rows, storage_of(kv_dtype))
    assert stored.shape == (3, 2, 14)
    found = decode(stored, torch.float32).double().numpy()
    values = rows.double().numpy()
    largest = 127.0 if kv_dtype == "int8" else 448.0
    scale = (np.abs(values).max(-1, keepdims=True) / largest).astype(np.float32).astype(np.float64)
    positive = np.arange(128.0) if kv_dtype == "int8" else float8_values()
    codes = np.concatenate((-positive[::-1], positive))
    nearest = np.abs(values[..., None] / scale[..., None] - codes).min(-1) * scale
    # Scaled and read back in float32: a tie may fall either way, and the value read is rounded.
    assert (np.abs(found - values) <= nearest + 4 * np.finfo(np.float32).eps * np.abs(values)).all()


@pytest.mark.parametrize("kv_dtype", CODED)
def test_zeros_stay_zeros_and_a_bad_row_is_bad_alone(kv_dtype: str) -> None:
    rows = torch.randn(4, 6)
    rows[1], rows[2, 3], rows[3, 0] = 0.0, float("nan"), float("inf")
    found = decode(encode(rows, storage_of(kv_dtype)), torch.float32)
    assert torch.isfinite(found[:2]).all() and not found[1].any()
    assert found[2:].isnan().all()
    untouched = torch.zeros(2, 10, dtype=storage_of(kv_dtype))
    assert not decode(untouched, torch.float32).any(), "memory that was zeroed reads as zeros"


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_sees_what_the_cache_holds(kv_dtype: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    form = kv_form(kv_dtype, dtype)
    coded, plain = (
        [torch.zeros(20, 4, 2, row, dtype=kind) for _ in range(2)]
        for row, kind in ((form.row_elements(8), form.storage), (8, dtype))
    )
    tables = torch.randperm(20, generator=generator)[:18].view(3, 6).numpy()
    for query_lens, context_lens in (([20, 17, 9], [20, 17, 9]), ([1, 1, 6], [21, 18, 15])):
        shape = (sum(query_lens), 2, 8)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        q = torch.randn(shape[0], 6, 8, generator=generator).to(dtype)
        batch = AttentionBatch(
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=tables,
            block_size=4,
            device=torch.device("cpu"),
            dtype=dtype,
        )
        ops.append_kv(k, v, coded[0], coded[1], batch.slots)
        read = [decode(encode(new, form.storage), dtype) for new in (k, v)]
        ops.append_kv(read[0], read[1], plain[0], plain[1], batch.slots)
        found = ops.paged_attention(q, coded[0], coded[1], batch, scale=0.3)
        torch.testing.assert_close(found, ops.paged_attention(q, plain[0], plain[1], batch, scale=0.3))


def engine_of(model: Model, kv_dtype: str, **changes: Any) -> Engine:
    return Engine(model, settings(kv_dtype=kv_dtype, **changes))


@pytest.mark.parametrize("kv_dtype", STORED)
def test_tokens_depend_neither_on_neighbours_nor_on_chunks_nor_on_swaps(model: Model, kv_dtype: str) -> None:
    prompts = {f"s{seed}": prompt_of(seed, 10 + 9 * seed) for seed in range(6)}
    alone = {
        name: answer(engine_of(model, kv_dtype, max_batch_tokens=200), prompt, greedy(40))
        for name, prompt in prompts.items()
    }
    crowded = engine_of(model, kv_dtype, num_blocks=30, host_blocks=64)
    for name, prompt in prompts.items():
        crowded.add(request(name, prompt, greedy(40)))
    assert tokens_of(run(crowded)) == alone
    assert crowded.stats().swapped_in_blocks > 0
    crowded.close()


@pytest.mark.parametrize("kv_dtype", STORED)
def test_blocks_leave_and_come_back_as_the_same_bytes(model: Model, kv_dtype: str) -> None:
    prompt = prompt_of(9, 50)
    first, second = (engine_of(model, kv_dtype) for _ in range(2))
    expected = answer(first, prompt, greedy(20), salt=b"t")
    hashes = block_hashes(prompt, 8, b"t")
    payloads = [first.export_block(block_hash) for block_hash in hashes]
    size = block_bytes(model.config, block_size=8, dtype=model.dtype, kv_dtype=kv_dtype)
    assert [len(payload or b"") for payload in payloads] == [size] * 6
    for block_hash, payload in zip(hashes, payloads, strict=True):
        assert payload is not None and second.import_block(block_hash, payload)
    assert answer(second, prompt, greedy(20), salt=b"t") == expected
    assert second.stats().prefix_hit_tokens == 48
    assert [second.export_block(block_hash) for block_hash in hashes] == payloads


def test_each_form_has_a_layout_of_its_own_and_8_bits_take_less(model: Model) -> None:
    memories = {name: KvMemory(model, num_blocks=2, block_size=8, kv_dtype=name) for name in KV_DTYPES}
    layouts = {name: memory.layout for name, memory in memories.items()}
    assert len(set(layouts.values())) == 4
    assert layouts["auto"].endswith("x8:float32") and layouts["int8"].endswith("x12:int8.float32")
    sizes = {name: memory.block_bytes for name, memory in memories.items()}
    assert sizes["auto"] == 2 * sizes["bf16"] == 32 / 12 * sizes["int8"] == 32 / 12 * sizes["fp8"]
    with pytest.raises(InvalidConfiguration, match="kv_dtype 'int4' does not exist; use one of auto, bf16"):
        KvMemory(model, num_blocks=2, block_size=8, kv_dtype="int4")


@pytest.mark.parametrize("kv_dtype", STORED)
def test_keys_are_turned_and_values_stay(model: Model, kv_dtype: str) -> None:
    assert model.key_rotation is not None
    memory = KvMemory(model, num_blocks=4, block_size=8, kv_dtype=kv_dtype)
    exact: list[tuple[Tensor, Tensor]] = []
    for keys, values in memory.layers:
        new = torch.randn(2, 8, 2, 8), torch.randn(2, 8, 2, 8)
        for cache, rows in ((keys, new[0]), (values, new[1])):
            cache[:2] = encode(rows, memory.dtype)
        exact.append((decode(keys[:2], torch.float32), values[:2].clone()))
    turn(memory, model.key_rotation, [0, 1], [2, 3], shift_tokens=16)
    step = {"bf16": 2.0**-8, "int8": 1 / 254, "fp8": 2.0**-4}[kv_dtype]
    for (keys, values), (before, kept) in zip(memory.layers, exact, strict=True):
        wanted = model.key_rotation.turn(before.flatten(0, 1), -16).view(before.shape)
        off = (decode(keys[2:], torch.float32) - wanted).abs().amax(-1)
        assert (off <= 1.01 * step * wanted.abs().amax(-1)).all()
        assert torch.equal(values[2:], kept)
