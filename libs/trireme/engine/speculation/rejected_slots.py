"""What wrong drafts leave behind in the KV, and between what is right."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from trireme.engine.kv_cache import KvCache
from trireme.engine.sequence import Sequence


def close_up(cache: KvCache, sequence: Sequence, path: Seq[int]) -> None:
    """Bring the keys and values of a tree's right tokens to where those of a chain would be.

    They were computed for the positions that they have there, so they only have to be moved.

    Args:
        path: the tokens' places behind those that are computed, rising.
    """
    moved = [(place, index) for index, place in enumerate(path) if place != index]
    if not moved:
        return
    slots = torch.tensor(moved, device=cache.memory.device).t() + sequence.num_computed
    blocks = torch.tensor(sequence.blocks, device=cache.memory.device)[slots // cache.block_size]
    (from_blocks, to_blocks), (from_offsets, to_offsets) = blocks, slots % cache.block_size
    tensor = cache.memory.tensor
    tensor[:, :, to_blocks, to_offsets] = tensor[:, :, from_blocks, from_offsets]


def clear_behind(cache: KvCache, sequence: Sequence) -> None:
    """Zero a running sequence's slots from its first token that is not computed.

    Slots of wrong drafts are masked until they are written again, which is enough, unless a drafted token
    has left values there that are not numbers: masked ones would still spoil sums.
    """
    size = cache.block_size
    first, offset = divmod(sequence.num_computed, size)
    if first < len(sequence.blocks):
        cache.memory.tensor[:, :, sequence.blocks[first], offset:] = 0
        if first + 1 < len(sequence.blocks):
            cache.memory.zero(sequence.blocks[first + 1 :])
