"""Paged attention equals its definition in float64, and its bits do not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cuda.attention_support import Step, assert_close
from tests.cuda.conftest import TYPES
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_attention import (
    HEAD_DIMS,
    SplitRule,
    attention_kernel,
    merge_kernel,
)
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import ShapeMismatch


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


@pytest.mark.parametrize("window", [None, 6])
def test_trees_share_a_step_with_longer_chunks(emulator: Emulator, window: int | None) -> None:
    trees = {2: [-1, 0, 0, 1, 1, 2, 5], 4: [-1, 0, 1, 0]}
    lengths, contexts = (1, 2, 7, 70, 4), (33, 9, 40, 90, 4)
    step = Step(lengths=lengths, contexts=contexts, heads=4, kv_heads=2, trees=trees)
    masks = step.batch.tree_masks
    assert masks is not None
    found = step.run(emulator, tree_masks=masks, window=window)
    of_trees = step.expected(tree_masks=masks, window=window)
    of_others = step.expected(window=window)
    assert_close(found, torch.where((masks != 0)[:, None], of_trees, of_others))


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
