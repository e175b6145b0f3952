"""Preempted sequences between device and host memory: nothing they computed is lost.

The copy rules, after FastServe: (a) a sequence runs only after its own swap-in has arrived;
(b) nothing is written to a block that a copy still reads: it drains; (c) one copy per sequence at
a time: while it moves it is not moved.
"""

from __future__ import annotations

from trireme.engine import block_moves
from trireme.engine.host_arena import HostArena
from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_copies import Copy
from trireme.engine.sequence import Sequence


class KvSwaps:
    """Both directions, for one cache."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def swap_out(self, sequence: Sequence) -> bool:
        """Copy a sequence's KV, its partial block included, to the host; it gives up its device blocks.

        They drain until the copy is over; complete ones stay findable on the device until they
        are needed. Blocks whose content the host has are not copied. False, and nothing is done:
        the host has too few blocks, the sequence moves, or it has no KV on the device.
        """
        cache, host = self._cache, self._cache.host
        if host is None or sequence.row < 0 or sequence.move is not None or sequence.load is not None:
            return False
        count = cache.blocks_for(sequence.num_computed)
        hashes = cache.complete_hashes(sequence)
        shared = cache.interchangeable(sequence, hashes)
        there = {i: block for i, name in enumerate(shared) if (block := host.pool.find(name)) is not None}
        host.pool.acquire(list(there.values()))
        missing = [index for index in range(count) if index not in there]
        fresh = host.pool.allocate(len(missing))
        if fresh is None:
            host.pool.release(list(there.values()))
            return False
        sources = [sequence.blocks[index] for index in missing]
        there.update(zip(missing, fresh, strict=True))
        sequence.host_blocks = [there[index] for index in range(count)]
        cache.pool.begin_copy(sources)
        host.pool.begin_copy(fresh)
        cache.detach(sequence)

        def then(copy: Copy) -> None:
            cache.pool.end_copy(sources)
            if sequence.move is copy:
                sequence.move = None
                if copy.is_complete:
                    for index, block_id in zip(missing, fresh, strict=True):
                        if index < len(hashes):
                            host.pool.cache(block_id, hashes[index])
                    cache.counters.swapped_out_blocks += len(missing)
                    cache.counters.swap_out_bytes += copy.num_bytes
                    cache.counters.swap_out_s += copy.seconds
                else:
                    self._lose(sequence)
            host.pool.end_copy(fresh)

        if missing:
            work = block_moves.swap_out(cache.memory, sources, host, fresh)
            sequence.move = cache.copies.copy_out(work, then)
        return True

    def swap_in(self, sequence: Sequence) -> bool:
        """Copy a sequence's KV back, and hold blocks for all that it must compute next.

        Complete blocks that the device has are not copied. False, and nothing is done: the device
        has too few blocks, the sequence moves, or it has no KV in the host.
        """
        cache, host = self._cache, self._cache.host
        if host is None or not sequence.host_blocks or sequence.move is not None:
            return False
        hashes = cache.complete_hashes(sequence)
        shared = cache.interchangeable(sequence, hashes)
        here = {i: block for i, name in enumerate(shared) if (block := cache.pool.find(name)) is not None}
        cache.pool.acquire(list(here.values()))
        total = cache.blocks_for(max(sequence.num_target, sequence.num_computed))
        lacking = [index for index in range(total) if index not in here]
        fresh = cache.pool.allocate(len(lacking))
        if fresh is None:
            cache.pool.release(list(here.values()))
            return False
        here.update(zip(lacking, fresh, strict=True))
        cache.attach(sequence, [here[index] for index in range(total)])
        missing = [index for index in lacking if index < len(sequence.host_blocks)]
        targets = [here[index] for index in missing]
        sources = [sequence.host_blocks[index] for index in missing]
        if not missing:
            self._arrive(sequence, host)
            return True
        cache.pool.begin_copy(targets)
        host.pool.begin_copy(sources)

        def then(copy: Copy) -> None:
            if sequence.move is copy:
                sequence.move = None
                if copy.is_complete:
                    for index, block_id in zip(missing, targets, strict=True):
                        if index < len(hashes):
                            cache.pool.cache(block_id, hashes[index])
                    cache.counters.swapped_in_blocks += len(missing)
                    cache.counters.swap_in_bytes += copy.num_bytes
                    cache.counters.swap_in_s += copy.seconds
                    self._arrive(sequence, host)
                else:
                    self._lose(sequence)
            cache.pool.end_copy(targets)
            host.pool.end_copy(sources)

        work = block_moves.swap_in(host, sources, cache.memory, targets)
        sequence.move = cache.copies.copy_in(work, then)
        return True

    def _arrive(self, sequence: Sequence, host: HostArena) -> None:
        host.pool.release(sequence.host_blocks)
        sequence.host_blocks = []
        sequence.num_committed = sequence.num_computed // self._cache.block_size
        self._cache.expect(sequence)

    def _lose(self, sequence: Sequence) -> None:
        self._cache.counters.lost_sequences += 1
        self._cache.release(sequence)
