"""A token of a tree sees what it would see at the end of its own path, whatever else is in the step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trireme.kernels import reference
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.kv_forms import KV_DTYPES, kv_form
from trireme.kernels.tree_paths import MAX_TREE_TOKENS, depths, hidden_keys, mask_bits
from trireme.loading.whole import load_model
from trireme.models.decoder import Decoder

BLOCK = 8
VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": 5}}


@st.composite
def trees(draw: st.DrawFn, most: int = 24) -> list[int]:
    """Parents of a random tree, deep or wide."""
    size = draw(st.integers(2, most))
    reach = draw(st.integers(1, size))
    return [-1, *(draw(st.integers(max(0, place - reach), place - 1)) for place in range(1, size))]


def path_to(parents: Sequence[int], place: int) -> list[int]:
    """Places from the root to this one."""
    path = [place]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


@given(trees(MAX_TREE_TOKENS))
def test_masks_are_the_ancestors(parents: list[int]) -> None:
    bits = [int(mask) & (1 << 64) - 1 for mask in mask_bits(parents)]
    for place in range(len(parents)):
        path = path_to(parents, place)
        assert [j for j in range(64) if bits[place] >> j & 1] == path
        assert depths(parents)[place] == len(path) - 1


@given(trees(), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 12)), st.data())
def test_what_is_hidden_is_what_the_path_does_not_have(
    parents: list[int], before: int, window: int | None, data: st.DataObject
) -> None:
    count = len(parents)
    num_queries = data.draw(st.integers(1, count))
    keys = np.arange(data.draw(st.integers(0, before)), before + count + 3)
    hidden = hidden_keys(parents, context=before + count, num_queries=num_queries, keys=keys, window=window)
    for query in range(num_queries):
        path = path_to(parents, count - num_queries + query)
        text = [*range(before), *(before + place for place in path)]
        seen = set(text if window is None else text[-window:])
        assert [key for key, unseen in zip(keys, hidden[query], strict=True) if not unseen] == [
            key for key in keys if key in seen
        ]


class Cache:
    """A paged cache of a few sequences, each in scattered blocks of its own."""

    def __init__(self, model: Decoder, sequences: int, kv_dtype: str, most: int = 112) -> None:
        config, form = model.config, kv_form(kv_dtype, model.dtype)
        width = most // BLOCK
        shape = (sequences * width, BLOCK, config.num_kv_heads, form.row_elements(config.head_dim))
        self.model = model
        self.kv = [
            (torch.zeros(shape, dtype=form.storage), torch.zeros(shape, dtype=form.storage))
            for _ in range(config.num_layers)
        ]
        order = np.random.default_rng(3).permutation(sequences * width).astype(np.int64)
        self.tables = order.reshape(sequences, width)

    @torch.inference_mode()
    def run(
        self,
        parts: Sequence[tuple[int, Sequence[int], int]],
        trees: dict[int, Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """(sequence, tokens, tokens in the cache before them) each; trees by place in `parts`."""
        trees = trees or {}
        positions: list[int] = []
        for index, (_, tokens, start) in enumerate(parts):
            stop = start + len(tokens)
            if (parents := trees.get(index)) is None:
                positions += range(start, stop)
            else:
                base = stop - len(parents)
                positions += (base + depths(parents)[-len(tokens) :]).tolist()
        batch = AttentionBatch(
            query_lens=[len(tokens) for _, tokens, _ in parts],
            context_lens=[start + len(tokens) for _, tokens, start in parts],
            block_tables=self.tables[[sequence for sequence, _, _ in parts]],
            block_size=BLOCK,
            device=torch.device("cpu"),
            dtype=self.model.dtype,
            trees=trees,
        )
        flat = torch.tensor([token for _, tokens, _ in parts for token in tokens])
        hidden = self.model.forward(flat, torch.tensor(positions), self.kv, batch)
        stops = list(itertools.accumulate(len(tokens) for _, tokens, _ in parts))
        return [hidden[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **FAMILIES[request.param])
    directory: Path = tmp_path_factory.mktemp(request.param)
    getattr(transformers, f"{request.param}ForCausalLM")(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(checkpoint: Path, *, is_native: bool) -> Decoder:
    model = load_model(checkpoint)
    assert isinstance(model, Decoder)
    if is_native and model._native is None:
        pytest.skip("the CPU kernels are not built for this machine")
    if not is_native:
        model._native = None
    return model


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("is_native", [True, False])
def test_every_token_of_a_tree_gets_what_decoding_its_path_gives(
    checkpoint: Path, is_native: bool, kv_dtype: str
) -> None:
    model = loaded(checkpoint, is_native=is_native)
    rng = np.random.default_rng(1)
    for before, size, split in ((0, 9, 9), (19, 14, 14), (43, 33, 33), (21, 20, 6), (30, 12, 1)):
        parents = [-1, *(int(rng.integers(max(0, place - 4), place)) for place in range(1, size))]
        text = rng.integers(0, VOCAB, before).tolist()
        tokens = rng.integers(0, VOCAB, size).tolist()
        other = rng.integers(0, VOCAB, 40).tolist()
        cache = Cache(model, 4, kv_dtype)
        for sequence, prompt in ((0, text), (1, other[:30]), (2, other[:11]), (3, text)):
            if prompt:
                cache.run([(sequence, prompt, 0)])
        if split < size:  # the first tokens of the tree are there from another step
            rest = size - split
            cache.run([(0, tokens[:rest], before)], {0: parents[:rest]})
        start = before + size - split
        parts = [(1, other[30:31], 30), (2, other[11:40], 11), (0, tokens[-split:], start)]
        # A second tree of another shape shares the step.
        twin = [-1, 0, 0, 1, 1]
        parts.append((3, tokens[:5], before))
        found = cache.run(parts, {2: parents, 3: twin})
        alone = Cache(model, 1, kv_dtype)
        for row, place in enumerate(range(size - split, size)):
            path = [tokens[at] for at in path_to(parents, place)]
            expected = alone.run([(0, [*text, *path], 0)])[0][-1]
            assert_same(found[2][row], expected, is_native)
        for place in range(5):
            path = [tokens[at] for at in path_to(twin, place)]
            assert_same(found[3][place], alone.run([(0, [*text, *path], 0)])[0][-1], is_native)
        # Who shares the step with trees is not disturbed.
        assert_same(found[0][0], alone.run([(0, other[:31], 0)])[0][-1], is_native)
        assert_same(found[1], alone.run([(0, other, 0)])[0][11:], is_native)


def assert_same(found: Tensor, expected: Tensor, is_native: bool) -> None:
    """To the last bit where one call computes it."""
    if is_native:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 20)), st.data())
def test_the_fallback_attends_to_the_path(
    parents: list[int], before: int, window: int | None, data: st.DataObject
) -> None:
    """Against attention over the path alone, in float64."""
    count = len(parents)
    num_queries = data.draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(before)
    shape = (-(-(before + count) // BLOCK), BLOCK, 2, 16)
    k_cache, v_cache = (torch.randn(shape, generator=generator) for _ in range(2))
    q = torch.randn((num_queries, 4, 16), generator=generator)
    batch = AttentionBatch(
        query_lens=[num_queries],
        context_lens=[before + count],
        block_tables=np.arange(shape[0], dtype=np.int64)[None],
        block_size=BLOCK,
        device=torch.device("cpu"),
        dtype=torch.float32,
        trees={0: parents},
    )
    found = reference.paged_attention(q, k_cache, v_cache, batch, scale=0.25, window=window)
    keys, values = (cache.view(-1, 2, 16).double() for cache in (k_cache, v_cache))
    for query in range(num_queries):
        path = path_to(parents, count - num_queries + query)
        text = [*range(before), *(before + place for place in path)]
        text = text if window is None else text[-window:]
        for head in range(4):
            weights = (keys[text, head // 2] @ q[query, head].double() * 0.25).softmax(0)
            torch.testing.assert_close(
                found[query].view(4, 16)[head].double(),
                weights @ values[text, head // 2],
                atol=1e-5,
                rtol=1e-4,
            )
