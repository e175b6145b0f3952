"""What the blocks of a cut sequence were called before the cut, where they are still found so.

The engine asks for what is resident, the worker for what the store has too: see `TruncatedPrefix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trireme.kvcache.block_identity import Supply
from trireme.policies.kv_truncation import TruncationRule, turnable_blocks

CountLeading = Callable[[Sequence[bytes]], int]
"""How many of the first of these blocks are there."""


class Supplied(NamedTuple):
    """Blocks that hold what is wanted, but for other positions."""

    hashes: list[bytes]
    shift_tokens: int
    """By how much their positions must fall."""


def supplied_blocks(
    supplies: Sequence[Supply],
    rule: TruncationRule,
    cuts: Sequence[int],
    *,
    num_own: int,
    most: int,
    count_leading: CountLeading,
) -> Supplied:
    """The longest run of blocks that can follow the first `num_own` of a cut sequence.

    It ends before a block whose keys would be rounded too often.

    Args:
        supplies: latest cut first.
        rule: how the sequence was cut.
        cuts: all of them, ascending.
        most: blocks that are wanted.
    """
    skipped = num_own - rule.head // rule.block_size
    best = Supplied([], 0)
    if skipped < 0 or most <= 0:
        return best
    for age, supply in enumerate(supplies):
        stop = min(len(supply.hashes), skipped + most)
        stop = skipped + turnable_blocks(
            rule, cuts[: len(cuts) - 1 - age], cuts[-1], first=skipped, stop=stop
        )
        names = supply.hashes[skipped:stop]
        found = count_leading(names)
        if found > len(best.hashes):
            best = Supplied(list(names[:found]), supply.shift_tokens)
    return best
