"""Trees of tokens that one step verifies: who sees whom.

A tree is told by its parents: place i holds the place of the token before token i, which is smaller, and -1
for the root. The tokens of a tree lie in the cache one after the other, in the order of their places, behind
what all of them see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_TREE_TOKENS: Final = 64
"""Of one tree, its root included: they fit the bits of a word."""


def depths(parents: Sequence[int]) -> NDArray[np.int64]:
    """(tokens,): how far each is from the root."""
    found = np.zeros(len(parents), dtype=np.int64)
    for place in range(1, len(parents)):
        found[place] = found[parents[place]] + 1
    return found


def mask_bits(parents: Sequence[int]) -> NDArray[np.int64]:
    """(tokens,): bit j of a token's mask says that the j-th is its ancestor, or itself."""
    masks: list[int] = []
    for place, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << place)
    return np.asarray(masks, dtype=np.uint64).view(np.int64)


def hidden_keys(
    parents: Sequence[int], *, context: int, num_queries: int, keys: NDArray[np.int64], window: int | None
) -> NDArray[np.bool_]:
    """(queries, keys): what the last `num_queries` tokens of a tree do not see.

    Args:
        context: tokens in the cache, the tree's included: it ends there.
        keys: (keys,) places in the cache.
        window: a query sees so many positions up to its own, which is by its depth; None: all.
    """
    count = len(parents)
    base = context - count
    bits = mask_bits(parents)[count - num_queries :, None]
    places = np.clip(keys - base, 0, count - 1)
    hidden: NDArray[np.bool_] = (keys >= base) & ((bits >> places & 1) == 0) | (keys >= context)
    if window is not None:
        depth = depths(parents)
        positions = np.where(keys < base, keys, base + depth[places])
        hidden |= positions <= base + depth[count - num_queries :, None] - window
    return hidden
