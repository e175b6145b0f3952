"""A sequence as the iteration policy sees it."""

from __future__ import annotations

from bisect import bisect_left

from trireme.engine.kv_cache import KvCache
from trireme.engine.sequence import Sequence
from trireme.policies.iteration import Location, SequenceView


def view_of(cache: KvCache, sequence: Sequence) -> SequenceView:
    """What running the sequence takes and what stopping it gives."""
    location = sequence.location
    num_target = sequence.num_target
    if location is Location.DEVICE:  # nearly all that are asked for
        blocks = sequence.blocks
        missing = cache.blocks_for(num_target) - len(blocks)
        num_tokens = num_target - sequence.num_computed
        return SequenceView(num_tokens, max(0, missing), _exclusive(cache, blocks), location)
    target = cache.blocks_for(num_target)
    if location is Location.NONE and sequence.load is None:
        matched = cache.match(sequence)
        next_block = cache.next_block(sequence, len(matched))
        return SequenceView(
            num_target - len(matched) * cache.block_size,
            target - sum(cache.pool.refs(block_id) > 0 for block_id in matched),
            0,
            location,
            next_block,
            cache.is_pending(next_block),
        )
    if location is Location.NONE and sequence.load is not None:
        kept = len(sequence.load.held) + (sequence.load.num_intact or 0)
        return SequenceView(num_target - kept * cache.block_size, max(0, target - kept), 0, location)
    num_blocks = target - len(sequence.blocks)
    if location is Location.HOST:
        shared = cache.interchangeable(sequence, cache.complete_hashes(sequence))
        found = map(cache.pool.find, shared)
        num_blocks -= sum(block_id is not None and cache.pool.refs(block_id) > 0 for block_id in found)
    return SequenceView(num_target - sequence.num_computed, max(0, num_blocks), 0, location)


def _exclusive(cache: KvCache, blocks: list[int]) -> int:
    """Blocks that nobody else refers to. Sequences share heads, so the first of these begins the tail."""
    refs = cache.pool.refs
    if blocks and refs(blocks[0]) == 1:
        return len(blocks)
    first = bisect_left(range(len(blocks)), True, key=lambda index: refs(blocks[index]) == 1)
    return len(blocks) - first
