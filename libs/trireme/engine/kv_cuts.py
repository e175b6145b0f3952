"""A running sequence that has filled its window loses its oldest tokens and goes on."""

from __future__ import annotations

from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_rotation import own, turn
from trireme.engine.sequence import Sequence
from trireme.models.rope import KeyRotation


def cut(cache: KvCache, sequence: Sequence) -> bool:
    """Drop what the plan says from a sequence with KV on the device, and move what stays.

    Where keys cannot be turned, or were too often, all behind the head is to be computed again.

    Returns:
        False: there are no blocks to move to. The sequence must give its KV up.
    """
    window = sequence.window
    assert window is not None and sequence.row >= 0
    if sequence.load is not None:  # all of its layers are there, for they were computed with
        cache.copies.finish(sequence.load.copy)
        cache.copies.poll()
    cache.pause(sequence)
    plan = window.plan(len(sequence.token_ids))
    rotation = None if window.is_rotated_too_often(plan) else cache.rotation
    gone = window.follow(plan, is_base=rotation is None)
    computed = sequence.num_computed - gone
    sequence.skip(gone)
    cache.counters.context_cuts += 1
    head, dropped = window.head_blocks, gone // cache.block_size
    blocks = sequence.blocks
    cache.pool.release(blocks[head : head + dropped])
    cache.hold(sequence, [*blocks[:head], *blocks[head + dropped :]])
    if rotation is None:
        cache.pool.release(sequence.blocks[head:])
        cache.hold(sequence, sequence.blocks[:head])
        computed = window.rule.head
    elif not _move(cache, sequence, rotation, head, cache.blocks_for(computed), gone):
        return False
    sequence.num_computed = computed
    sequence.num_committed = head
    cache.commit(sequence)
    window.fill(sequence.token_ids)
    cache.expect(sequence)
    return True


def _move(
    cache: KvCache, sequence: Sequence, rotation: KeyRotation, first: int, stop: int, shift_tokens: int
) -> bool:
    """Turn the keys of the blocks first .. stop - 1, in copies where others see them."""
    blocks = sequence.blocks
    sources = blocks[first:stop]
    targets = own(cache.pool, sources)
    if targets is None:
        return False
    turn(cache.memory, rotation, sources, targets, shift_tokens=shift_tokens)
    cache.hold(sequence, [*blocks[:first], *targets, *blocks[stop:]])
    cache.pool.release([source for source, target in zip(sources, targets, strict=True) if source != target])
    cache.counters.rerotated_blocks += len(sources)
    return True
