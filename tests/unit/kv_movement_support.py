"""A roster that decides by chance, and stored blocks of all qualities."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from trireme.engine import Engine, StoredBlock
from trireme.engine.batch import Part
from trireme.engine.kv_swaps import KvSwaps
from trireme.engine.sequence import Sequence
from trireme.engine.tally import StepReport
from trireme.kvcache.block_codec import payload_checksum
from trireme.kvcache.block_pool import BlockPool
from trireme.policies.iteration import Location


class ChanceRoster:
    """Pauses, swaps, evicts, admits and runs whom it pleases, within what the cache allows."""

    def __init__(self, engine: Engine, chance: random.Random) -> None:
        self._cache = engine._cache
        self._preloads = engine._preloads
        self._swaps = KvSwaps(engine._cache)
        self._settings = engine.settings
        self._chance = chance
        self.everybody: dict[str, Sequence] = {}
        self.evictions = 0
        self.swap_outs = 0
        self.pauses = 0
        self.num_paused = self.num_swapped = 0

    @property
    def num_waiting(self) -> int:
        return len(self.everybody) - len(self.running)

    @property
    def running(self) -> list[Sequence]:
        return [s for s in self.everybody.values() if s.location is not Location.NONE]

    def add(self, sequence: Sequence) -> None:
        self.everybody[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        self.everybody.pop(sequence.sequence_id, None)
        self._cache.release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        self._cache.release(sequence)
        self.evictions += 1

    def charge(self, seconds: float, report: StepReport, *, now_s: float) -> None:
        """Time changes nothing here."""

    def schedule(self, report: StepReport, *, now_s: float) -> list[Part]:
        chance, cache = self._chance, self._cache
        order = list(self.everybody.values())
        chance.shuffle(order)
        self._preloads.start(order, reserve=0)
        tokens = self._settings.max_batch_tokens
        parts: list[Part] = []
        for sequence in order:
            before = sequence.location
            if before is Location.HOST and chance.random() < 0.5:
                self._swaps.swap_in(sequence)
            elif before is Location.NONE and chance.random() < 0.5 and cache.admit(sequence):
                if sequence.most_computed == 0:
                    sequence.cached_tokens = sequence.num_computed
                sequence.most_computed = max(sequence.most_computed, sequence.num_computed)
            if sequence.location is not Location.DEVICE:
                continue
            if chance.random() < 0.1:
                self.swap_outs += self._swaps.swap_out(sequence)
            elif chance.random() < 0.1:
                self.pauses += 1
                cache.pause(sequence)
            elif tokens and cache.grow(sequence, sequence.num_target):
                cache.expect(sequence)
                left = sequence.num_target - sequence.num_computed
                count = chance.randint(1, min(tokens, left))
                tokens -= count
                parts.append(Part(sequence, count))
        if not parts:
            self._make_room()
        return sorted(parts, key=lambda part: part.num_tokens != 1)

    def _make_room(self) -> None:
        """Nobody runs: with every block held by those who need one more, nobody ever would."""
        stuck = [s for s in self.everybody.values() if s.location is Location.DEVICE and s.load is None]
        if not stuck or self._chance.random() < 0.5:
            return
        victim = self._chance.choice(stuck)
        if self._swaps.swap_out(victim):
            self.swap_outs += 1
            return
        may_swap_in = any(s.host_blocks for s in self.everybody.values())
        if not may_swap_in or self._chance.random() < 0.2:
            self.preempt(victim)


class Releases:
    """Counts how often each offered block was let go of."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def offer(self, block_hash: bytes, payload: bytes | bytearray, checksum: int | None) -> StoredBlock:
        place = len(self.counts)
        self.counts.append(0)

        def release() -> None:
            self.counts[place] += 1

        return StoredBlock(block_hash, payload, checksum, release)


def library_of(engine: Engine, hashes: Iterable[bytes]) -> dict[bytes, bytes]:
    """The bytes of blocks that an engine has."""
    payloads = ((name, engine.export_block(name)) for name in hashes)
    return {name: payload for name, payload in payloads if payload is not None}


def sound(library: dict[bytes, bytes], releases: Releases) -> list[StoredBlock]:
    """All blocks as they were stored."""
    return [releases.offer(name, data, payload_checksum(data)) for name, data in library.items()]


def shaken(library: dict[bytes, bytes], releases: Releases, chance: random.Random) -> Iterator[StoredBlock]:
    """Blocks of which some are damaged, short, missing or somebody else's."""
    for name, data in library.items():
        fate = chance.random()
        checksum = payload_checksum(data)
        if fate < 0.05:
            damaged = bytearray(data)
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            yield releases.offer(name, damaged, checksum)
        elif fate < 0.08:
            yield releases.offer(name, data[: chance.randrange(len(data))], checksum)
        elif fate < 0.11:
            yield releases.offer(name[::-1], data, checksum)
        elif fate > 0.13:
            yield releases.offer(name, data, checksum if chance.random() < 0.9 else None)


def conserves(pool: BlockPool) -> bool:
    """Every block is in exactly one state."""
    return pool.num_free + pool.num_cached + pool.num_draining + pool.num_held == pool.num_blocks
