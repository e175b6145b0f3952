"""Stored blocks brought to the device while their sequence waits.

Blocks of its prefix may be joined before all their layers are there. What stood there before a cut is
loaded under its own names: the sequence takes it from there, turned to where it stands now.

A loaded prefix that its sequence has not joined yet is cached like any other complete prefix: it
may be given up for what runs, so loads can never lock the engine up. It goes last, and together
such prefixes take no more than what is available, so they do not push each other out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import takewhile

from trireme.engine.block_moves import Load
from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_copies import Copy
from trireme.engine.sequence import Sequence
from trireme.engine.stored_blocks import StoredBlock, let_go_of

LayersNeeded = Callable[[int, int], int]
"""How many layers of the KV to load must be there before the sequence may run, by (tokens to load,
tokens it computes then)."""


SOON_S = 0.0
"""Next use of a prefix that waits for its sequence: it goes only after what nobody waits for."""


class KvPreloads:
    """Loads for one cache.

    Args:
        layers_needed: the rule, or one number for all; out of range means all layers or none.
    """

    def __init__(self, cache: KvCache, layers_needed: int | LayersNeeded) -> None:
        self._cache = cache
        self._layers_needed = layers_needed
        self._offered: set[Sequence] = set()

    @property
    def has_offers(self) -> bool:
        """Somebody's load is still to begin."""
        return bool(self._offered)

    def offer(self, sequence: Sequence, stored: Seq[StoredBlock]) -> bool:
        """Stored blocks for a sequence that waits, in place of those offered before.

        False, and they are let go, if the sequence has KV or gets some already.
        """
        self.withdraw(sequence)
        if sequence.row >= 0 or sequence.host_blocks or not self._cache.shares:
            let_go_of(stored)
            return False
        if stored:
            sequence.stored = tuple(stored)
            self._offered.add(sequence)
        return True

    def withdraw(self, sequence: Sequence) -> None:
        """What was offered for it is not needed any more."""
        self._offered.discard(sequence)
        stored, sequence.stored = sequence.stored, ()
        let_go_of(stored)

    def start(self, waiting: Iterable[Sequence], *, reserve: int) -> None:
        """Begin the loads of waiting sequences, next ones first, while there is room for them.

        Args:
            reserve: available blocks that are left alone.
        """
        room = self._cache.pool.num_available - reserve
        for sequence in waiting:
            room -= len(sequence.preloaded)
            if sequence.stored:
                taken = self._start(sequence, room)
                if taken is None:
                    return
                room -= taken

    def _start(self, sequence: Sequence, room: int) -> int | None:
        """Blocks taken; None if there is no room for them."""
        cache = self._cache
        pool = cache.pool
        matched = cache.match(sequence)
        num_own = len(matched)
        names = cache.hashes(sequence, sequence.reusable_tokens)
        held, hashes = names[:num_own], names[num_own:]
        if hashes and cache.is_pending(hashes[0]):
            return 0  # another sequence brings or computes it
        offered = {block.block_hash: block for block in sequence.stored}
        run = list(takewhile(offered.__contains__, hashes))

        def is_there(name: bytes) -> bool:
            return name in offered or pool.find(name) is not None

        supply = cache.supplied(
            sequence, num_own + len(run), lambda names: sum(1 for _ in takewhile(is_there, names))
        )
        for name in supply.hashes:
            block_id = pool.find(name)
            if block_id is None:
                run.append(name)
            else:
                held.append(name)
                matched.append(block_id)
        needed = len(run) + sum(pool.refs(block_id) == 0 for block_id in matched)
        if run and needed > room:
            return None
        stored, sequence.stored = sequence.stored, ()
        self._offered.discard(sequence)
        blocks = tuple(offered[name] for name in run)
        wanted = set(map(id, blocks))
        let_go_of(block for block in stored if id(block) not in wanted)
        if not run:
            return 0
        pool.acquire(matched)
        fresh = pool.allocate(len(run))
        assert fresh is not None, "counted above"
        load = Load(
            blocks,
            fresh,
            run,
            held,
            self._layers(sequence, len(matched), len(run)),
            is_of_prefix=not supply.hashes,
        )
        cache.attach(sequence, matched + fresh)
        sequence.num_committed = num_own
        sequence.load = load
        pool.begin_copy(fresh)
        cache.expect(sequence)
        load.copy = cache.copies.copy_in(
            load.parts(cache.memory), lambda copy: self._end(sequence, load, copy)
        )
        return needed

    def _layers(self, sequence: Sequence, matched: int, loaded: int) -> int:
        rule = self._layers_needed
        if not isinstance(rule, int):
            size = self._cache.block_size
            rule = rule(loaded * size, sequence.num_target - (matched + loaded) * size)
        return min(max(rule, 0), self._cache.memory.num_layers)

    def _end(self, sequence: Sequence, load: Load, copy: Copy) -> None:
        cache = self._cache
        unread, load.stored = load.stored, ()
        let_go_of(unread)
        if load.num_intact is not None:
            cache.counters.preload_corrupt += load.num_intact < len(load.blocks)
        intact = load.num_intact or 0 if copy.is_complete else 0
        cache.counters.preload_blocks += intact
        if sequence.load is load:
            sequence.load = None
            if load.is_joined and not copy.is_complete:
                # Admitted, but not run since: no step has met the layer that will never be there.
                cache.counters.lost_sequences += 1
                cache.release(sequence)
            elif not load.is_joined:
                for block_id, name in zip(load.blocks[:intact], load.hashes, strict=False):
                    cache.pool.cache(block_id, name)
                cache.release(sequence)
                sequence.preloaded = (*load.held, *load.hashes[:intact])
                for name in sequence.preloaded:
                    cache.pool.set_next_use(name, SOON_S)
        cache.pool.end_copy(load.blocks)
