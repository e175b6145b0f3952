"""KV that stays while the tokens before it go: keys are turned to their new positions.

Values have no position. Blocks that others may find are never turned: they are copied first.

Source: Gao et al., CachedAttention, USENIX ATC 2024 (positions apart from cached keys). They store
keys without a position; here keys are stored with one and turned by the difference.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from trireme.engine.kv_memory import KvMemory
from trireme.engine.request import Truncation
from trireme.kvcache.block_identity import Supply
from trireme.kvcache.block_pool import BlockPool
from trireme.models.rope import KeyRotation
from trireme.policies.kv_truncation import MAX_ROTATIONS, TruncationPlan, TruncationRule, rotations


class Found(NamedTuple):
    """Resident blocks that hold what is wanted, but for other positions."""

    blocks: list[int]
    shift_tokens: int
    """By how much their positions must fall."""


NOTHING = Found([], 0)


def find_supply(
    pool: BlockPool, truncation: Truncation, rule: TruncationRule, *, num_matched: int, most: int
) -> Found:
    """The longest run of resident blocks that can follow the first `num_matched` of a cut sequence.

    It ends before a block whose keys would be rounded too often.

    Args:
        most: blocks that are wanted.
    """
    head_blocks = truncation.head_tokens // rule.block_size
    skipped = num_matched - head_blocks
    best = NOTHING
    if skipped < 0 or most <= 0:
        return best
    for age, supply in enumerate(truncation.supplies):
        allowed = _fresh_enough(truncation, rule, supply, age=age, first=skipped)
        blocks = pool.match(supply.hashes[skipped : skipped + min(most, allowed)])
        if len(blocks) > len(best.blocks):
            best = Found(blocks, supply.shift_tokens)
    return best


def turn(
    memory: KvMemory, rotation: KeyRotation, sources: Seq[int], targets: Seq[int], *, shift_tokens: int
) -> None:
    """Write the KV of blocks, with positions that are `shift_tokens` lower, to others or in place."""
    read = torch.tensor(sources, dtype=torch.int64, device=memory.device)
    write = torch.tensor(targets, dtype=torch.int64, device=memory.device)
    for keys, values in memory.layers:
        moved = keys.index_select(0, read)  # (blocks, block_size, kv heads, head dim)
        turned = rotation.turn(moved.flatten(0, 1), -shift_tokens)
        keys.index_copy_(0, write, turned.view_as(moved))
        values.index_copy_(0, write, values.index_select(0, read))


def own(pool: BlockPool, blocks: Seq[int]) -> list[int] | None:
    """For each held block itself, if nobody else can see it, or a new one in its place.

    A new one carries a reference, that to the old one stays. Where there are too few, blocks that no
    other sequence holds are taken out of the cache instead. None, and nothing is taken: too few still.
    """
    visible = [block for block in blocks if pool.refs(block) > 1 or pool.hash_of(block) is not None]
    fresh = pool.allocate(len(visible))
    if fresh is None:
        single = {block for block in visible if pool.refs(block) == 1 and not pool.is_copied(block)}
        visible = [block for block in visible if block not in single]
        fresh = pool.allocate(len(visible))
        if fresh is None:
            return None
        pool.forget(single)
    instead = dict(zip(visible, fresh, strict=True))
    return [instead.get(block, block) for block in blocks]


def _fresh_enough(
    truncation: Truncation, rule: TruncationRule, supply: Supply, *, age: int, first: int
) -> int:
    """Blocks of a supply, from the `first` on, that may be turned once more."""
    cuts = truncation.cuts
    before = TruncationPlan(
        num_tokens=0, head=truncation.head_tokens, cuts=cuts[: len(cuts) - 1 - age], reason=""
    )
    size = rule.block_size
    count = 0
    for block in range(first, len(supply.hashes)):
        if rotations(before, rule, cuts[-1] + block * size) >= MAX_ROTATIONS:
            break
        count += 1
    return count
