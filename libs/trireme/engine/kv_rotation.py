"""KV that stays while the tokens before it go: keys are turned to their new positions.

Values have no position. Blocks that others may find are never turned: they are copied first.

Source: Gao et al., CachedAttention, USENIX ATC 2024 (positions apart from cached keys). They store
keys without a position; here keys are stored with one and turned by the difference.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from trireme.engine.kv_memory import KvMemory
from trireme.kernels.kv_forms import decode, encode
from trireme.kvcache.block_pool import BlockPool
from trireme.models.rope import KeyRotation


def turn(
    memory: KvMemory, rotation: KeyRotation, sources: Seq[int], targets: Seq[int], *, shift_tokens: int
) -> None:
    """Write the KV of blocks, with positions that are `shift_tokens` lower, to others or in place."""
    read = torch.tensor(sources, dtype=torch.int64, device=memory.device)
    write = torch.tensor(targets, dtype=torch.int64, device=memory.device)
    for keys, values in memory.layers:
        moved = keys.index_select(0, read)  # (blocks, block_size, kv heads, row)
        decoded = decode(moved.flatten(0, 1), memory.computed_dtype)
        turned = encode(rotation.turn(decoded, -shift_tokens), memory.dtype)
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
