"""What wrong drafts leave behind in the KV."""

from __future__ import annotations

from trireme.engine.kv_cache import KvCache
from trireme.engine.sequence import Sequence


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
