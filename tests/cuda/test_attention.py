"""Paged attention equals its definition in float64, and its bits do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import TYPES
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_attention import (
    HEAD_DIMS,
    SplitRule,
    attention_kernel,
    merge_kernel,
    paged_attention,
)
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import ShapeMismatch

FEW_KEYS = SplitRule(unit=64, most=3)


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare(
        kernel
        for kind in TYPES
        for head_dim in HEAD_DIMS
        for kernel in (
            attention_kernel(kind, head_dim, 1),
            attention_kernel(kind, head_dim, 4),
            merge_kernel(kind, head_dim),
        )
    )


class Step:
    """A batch with random queries and a cache whose unused slots are NaN."""

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        contexts: Sequence[int],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(contexts) // block_size)
        order = torch.randperm(width * len(contexts) + 3, generator=generator)[: width * len(contexts)]
        self.tables = order.view(len(contexts), width).numpy().astype(np.int64)
        self.batch = AttentionBatch(
            query_lens=lengths,
            context_lens=contexts,
            block_tables=self.tables,
            block_size=block_size,
            device=torch.device("cpu"),
            dtype=dtype,
        )
        shape = (len(contexts) * width + 3, block_size, kv_heads, head_dim)
        self.caches = torch.full((2, *shape), torch.nan, dtype=dtype)
        self.texts = []
        for index, context in enumerate(contexts):
            text = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(dtype)
            self.texts.append(text)
            slots = torch.from_numpy(self.tables[index])[:, None] * block_size + torch.arange(block_size)
            self.caches.view(2, -1, kv_heads, head_dim)[:, slots.view(-1)[:context]] = text
        wide = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
        self.q = wide[:, :heads]
        self.scale = head_dim**-0.5

    def run(
        self,
        emulator: Emulator,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        tree_masks: Tensor | None = None,
    ) -> Tensor:
        return paged_attention(
            emulator,
            self.q,
            self.caches[0],
            self.caches[1],
            self.batch,
            scale=self.scale,
            window=window,
            soft_cap=soft_cap,
            tree_masks=tree_masks,
            splits=FEW_KEYS,
        )

    def expected(
        self, *, window: int | None = None, soft_cap: float | None = None, tree_masks: Tensor | None = None
    ) -> Tensor:
        """Token by token, head by head, in float64."""
        rows = []
        token = 0
        for index, length in enumerate(self.batch.query_lens):
            context = self.batch.context_lens[index]
            keys, values = self.texts[index].double()
            places = torch.arange(context)
            first = token
            masks = [int(mask) & (1 << 64) - 1 for mask in tree_masks] if tree_masks is not None else []
            if masks:
                places[context - length :] = (
                    context - length + torch.tensor([masks[first + j].bit_count() - 1 for j in range(length)])
                )
            for j in range(length):
                position = context - length + j
                seen = torch.arange(context) <= position
                if masks:
                    in_tree = [bool(masks[token] >> other & 1) for other in range(length)]
                    seen[context - length :] = torch.tensor(in_tree)
                    position = int(places[position])
                if window is not None:
                    seen &= places > position - window
                for head in range(self.q.shape[1]):
                    kv_head = head // (self.q.shape[1] // keys.shape[1])
                    scores = keys[seen, kv_head] @ self.q[token, head].double() * self.scale
                    if soft_cap is not None:
                        scores = soft_cap * torch.tanh(scores / soft_cap)
                    rows.append(scores.softmax(0) @ values[seen, kv_head])
                token += 1
        return torch.stack(rows).view(token, -1)


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Weights are rounded to the type before they meet the values: a few of its steps."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    steps = (actual.double() - exact).abs().max() / torch.finfo(actual.dtype).eps
    assert float(steps) < 1.5, f"off by {float(steps)} steps of 1"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_and_prefill_in_one_batch(emulator: Emulator, kind: str, head_dim: int) -> None:
    step = Step(
        lengths=(1, 1, 7, 35),
        contexts=(1, 70, 7, 50),
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        dtype=TYPES[kind],
    )
    assert_close(step.run(emulator), step.expected())


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (10, 2), (17, 1)])
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_heads_share_keys_and_blocks_have_any_size(
    emulator: Emulator, heads: int, kv_heads: int, block_size: int
) -> None:
    step = Step(lengths=(1, 5), contexts=(33, 20), heads=heads, kv_heads=kv_heads, block_size=block_size)
    assert_close(step.run(emulator), step.expected())


@pytest.mark.parametrize("context", [63, 64, 65, 128, 129, 193, 400])
def test_a_long_decode_is_split_and_merged(emulator: Emulator, context: int) -> None:
    step = Step(lengths=(1, 1), contexts=(context, 3), heads=3, kv_heads=1)
    assert_close(step.run(emulator), step.expected())


@pytest.mark.parametrize("window", [1, 5, 16, 64, 100, 1000])
def test_a_window_hides_what_is_far_back(emulator: Emulator, window: int) -> None:
    step = Step(lengths=(1, 1, 40), contexts=(300, 9, 170))
    assert_close(step.run(emulator, window=window), step.expected(window=window))


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_a_soft_cap_bounds_the_scores(emulator: Emulator, soft_cap: float) -> None:
    step = Step(lengths=(1, 20), contexts=(50, 40), head_dim=64)
    assert_close(step.run(emulator, soft_cap=soft_cap), step.expected(soft_cap=soft_cap))


def random_tree(size: int, generator: np.random.Generator) -> list[int]:
    """Masks of a tree whose first token is its root; each other hangs on an earlier one."""
    masks = [1]
    for j in range(1, size):
        masks.append(masks[int(generator.integers(j))] | 1 << j)
    return masks


@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("size", [2, 13, 64])
def test_a_token_of_a_tree_sees_its_ancestors(emulator: Emulator, window: int | None, size: int) -> None:
    generator = np.random.default_rng(size)
    masks = [1, *random_tree(size, generator), *random_tree(5, generator)]
    step = Step(lengths=(1, size, 5), contexts=(20, size + 37, 5), heads=3, kv_heads=1)
    signed = torch.from_numpy(np.asarray(masks, dtype=np.uint64).view(np.int64))
    actual = step.run(emulator, tree_masks=signed, window=window)
    assert_close(actual, step.expected(tree_masks=signed, window=window))


def test_a_chain_is_a_tree_without_branches(emulator: Emulator) -> None:
    step = Step(lengths=(9,), contexts=(30,))
    chain = torch.tensor([(1 << j + 1) - 1 for j in range(9)])
    assert torch.equal(step.run(emulator, tree_masks=chain), step.run(emulator))


@pytest.mark.parametrize("window", [None, 50])
def test_a_sequences_bits_do_not_depend_on_the_batch(emulator: Emulator, window: int | None) -> None:
    together = Step(lengths=(1, 1, 1, 30), contexts=(5, 260, 90, 75))
    results = together.run(emulator, window=window)
    for index, token in ((0, 0), (1, 1), (2, 2), (3, 3)):
        alone = Step(
            lengths=(together.batch.query_lens[index],), contexts=(together.batch.context_lens[index],)
        )
        alone.batch = AttentionBatch(
            query_lens=alone.batch.query_lens,
            context_lens=alone.batch.context_lens,
            block_tables=together.tables[index : index + 1],
            block_size=16,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )
        alone.caches = together.caches
        alone.q = together.q[token : token + together.batch.query_lens[index]]
        assert torch.equal(alone.run(emulator, window=window), results[token : token + len(alone.q)])


@pytest.mark.parametrize("window", [None, 30])
def test_prefill_bits_do_not_depend_on_chunks(emulator: Emulator, window: int | None) -> None:
    whole = Step(lengths=(130,), contexts=(130,))
    expected = whole.run(emulator, window=window)
    for first, last in ((0, 47), (47, 49), (49, 130)):
        chunk = Step(lengths=(last - first,), contexts=(last,))
        chunk.batch = AttentionBatch(
            query_lens=(last - first,),
            context_lens=(last,),
            block_tables=whole.tables,
            block_size=16,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )
        chunk.caches, chunk.q = whole.caches, whole.q[first:last]
        assert torch.equal(chunk.run(emulator, window=window), expected[first:last])


def test_splits_depend_on_the_length_alone() -> None:
    rule = SplitRule(unit=64, most=3)
    assert [rule.splits(context) for context in (1, 64, 65, 192, 193, 384, 385)] == [1, 1, 2, 3, 2, 3, 3]


def test_what_the_kernel_does_not_take_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ShapeMismatch, match="head_dim is 48"):
        Step(lengths=(1,), contexts=(1,), head_dim=48).run(emulator)
    with pytest.raises(ShapeMismatch, match="block_size is 12"):
        Step(lengths=(1,), contexts=(1,), block_size=12).run(emulator)
    with pytest.raises(ShapeMismatch, match="a tree has 65 tokens"):
        Step(lengths=(65,), contexts=(65,)).run(emulator, tree_masks=torch.ones(65, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match="tree_masks has shape"):
        Step(lengths=(2,), contexts=(2,)).run(emulator, tree_masks=torch.ones(1, dtype=torch.int64))
