"""The blocks of one node over both tiers, as the kvstore service holds them.

Invariant: a block is readable only while its slot is pinned by a lease, and a slot in
use is never given away, so no reader sees the bytes of another block under its name.
All methods belong to one event loop; only SSD reads and writes happen elsewhere.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.errors import InvalidRequest
from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import (
    HASH_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockHeader,
    BlockKey,
    block_key,
    block_keys,
    namespace_digest,
    tenant_label,
    write_generation,
)
from trireme.kvcache.dram_tier import DramTier, Lease, Slot
from trireme.kvcache.ssd_tier import SsdTier
from trireme.runtime.clock import Clock

RESERVATION_S = 30.0
"""A writer that has not committed by then is taken for dead."""
MAX_LEASE_S = 30.0
MAX_DEADLINE_S = 30.0
_SWEEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBlock:
    """A block to be saved."""

    block_hash: bytes
    payload_bytes: int
    checksum: int


class Refusal(enum.Enum):
    """Why no room was reserved."""

    PRESENT = "present"
    NO_SPACE = "no_space"


@dataclass(frozen=True, slots=True)
class Acquired:
    """The leading blocks of a chain; `lease_id` is 0 where there are none."""

    slots: list[Slot]
    lease_id: int
    lease_s: float


@dataclass(slots=True)
class Counters:
    """What was done since the start, in blocks."""

    lookups: int = 0
    matched: int = 0
    dram_hits: int = 0
    ssd_hits: int = 0
    misses: int = 0
    late: int = 0
    committed: int = 0
    promoted: int = 0
    dram_corrupt: int = 0


@dataclass(slots=True)
class _Promotion:
    task: asyncio.Task[None]
    leases: list[Lease] = field(default_factory=list)


class TieredStore:
    """Blocks in an arena and, where there is one, on an SSD."""

    def __init__(self, arena: Arena, ssd: SsdTier | None, *, clock: Clock) -> None:
        self.arena = arena
        self.ssd = ssd
        self.dram = DramTier(arena, on_evict=self._on_evict)
        self.counters = Counters()
        self.last_sweep_s = clock.monotonic_s()
        self._clock = clock
        self._promotions: dict[BlockKey, _Promotion] = {}

    def match(self, namespace: str, block_hashes: bytes) -> tuple[int, int]:
        """Leading blocks of a chain that some tier holds, and that DRAM holds.

        Raises:
            InvalidRequest: `block_hashes` is no multiple of 16 bytes.
        """
        keys = block_keys(namespace, block_hashes)
        available = len(list(itertools.takewhile(self._is_here, keys)))
        in_dram = len(list(itertools.takewhile(self.dram.__contains__, keys)))
        self.counters.lookups += len(keys)
        self.counters.matched += available
        return available, in_dram

    def reserve(self, namespace: str, tenant: str, blocks: Sequence[NewBlock]) -> list[Slot | Refusal]:
        """Room for each block, or why there is none.

        Raises:
            InvalidRequest: a hash has not 16 bytes, or a payload none or too many.
        """
        for block in blocks:
            if len(block.block_hash) != HASH_BYTES:
                raise InvalidRequest(
                    f"a block hash has {len(block.block_hash)} bytes instead of {HASH_BYTES}",
                    param="block_hash",
                )
            if not 0 < block.payload_bytes <= MAX_PAYLOAD_BYTES:
                raise InvalidRequest(
                    f"a payload has {block.payload_bytes} bytes, which is not in 1..{MAX_PAYLOAD_BYTES}",
                    param="payload_bytes",
                )
        digest, label = namespace_digest(namespace), tenant_label(tenant)
        return [self._reserve_one(digest, label, block) for block in blocks]

    def commit(self, generations: Sequence[int]) -> int:
        """Make reserved blocks readable, first of the chain first; returns how many still were reserved."""
        slots = [slot for slot in map(self.dram.commit, generations) if slot is not None]
        self.dram.touch([slot.header.key for slot in slots])
        self.counters.committed += len(slots)
        return len(slots)

    def abort(self, generations: Sequence[int]) -> int:
        """Give reserved room back; returns how many still were reserved."""
        return sum(map(self.dram.abort, generations))

    async def acquire(
        self, namespace: str, block_hashes: bytes, *, deadline_s: float, lease_s: float
    ) -> Acquired:
        """Keep the leading blocks of a chain in place for a reader, up to the first miss.

        Blocks on SSD are read into DRAM for at most `deadline_s`; a block that comes later is
        a miss now and a hit next time.

        Raises:
            InvalidRequest: `block_hashes` is no multiple of 16 bytes.
        """
        keys = block_keys(namespace, block_hashes)
        deadline_s, lease_s = min(deadline_s, MAX_DEADLINE_S), min(lease_s, MAX_LEASE_S)
        lease = self.dram.open_lease(expires_s=self._clock.monotonic_s() + deadline_s + lease_s)
        here = list(itertools.takewhile(self._is_here, keys))
        # All that is in DRAM is pinned first, or room for the rest would be made from it.
        in_dram = [key for key in here if self.dram.pin(lease, key)]
        promotions = self._promote_for(lease, here)
        try:
            late = await _wait_for(promotions, deadline_s)
        except asyncio.CancelledError:
            self.dram.release(lease.lease_id)
            raise
        found = list(itertools.takewhile(lease.slots.__contains__, keys))
        from_dram = len(set(in_dram).intersection(found))
        self.counters.dram_hits += from_dram
        self.counters.ssd_hits += len(found) - from_dram
        self.counters.misses += len(keys) - len(found)
        self.counters.late += late
        if not found:
            self.dram.release(lease.lease_id)
            return Acquired([], 0, 0.0)
        self.dram.touch(found)
        lease.expires_s = self._clock.monotonic_s() + lease_s
        return Acquired([lease.slots[key] for key in found], lease.lease_id, lease_s)

    def release(self, lease_id: int, *, corrupt_generations: Sequence[int] = ()) -> bool:
        """End a lease; blocks reported corrupt are forgotten. False where it had ended."""
        held, dropped = self.dram.release(lease_id, corrupt_generations=corrupt_generations)
        self.counters.dram_corrupt += dropped
        return held

    async def prefetch(self, namespace: str, block_hashes: bytes) -> int:
        """Read blocks that will be needed soon from SSD into DRAM; returns how many were read.

        Takes at most a quarter of DRAM per call, so that one hint does not put out everything.

        Raises:
            InvalidRequest: `block_hashes` is no multiple of 16 bytes.
        """
        promoted, budget_bytes = 0, self.dram.capacity_bytes // 4
        for key in block_keys(namespace, block_hashes):
            if key in self.dram:
                continue
            promotion = self._promote(key)
            if promotion is None:
                continue
            await asyncio.shield(promotion.task)
            header = self.ssd.header(key) if self.ssd else None
            budget_bytes -= header.payload_bytes if header else 0
            promoted += key in self.dram
            if budget_bytes <= 0:
                break
        return promoted

    def sweep(self) -> None:
        """End what outlived its time."""
        self.last_sweep_s = self._clock.monotonic_s()
        self.dram.expire(self.last_sweep_s)

    async def run(self) -> None:
        """Sweep, and write behind, for ever."""
        async with asyncio.TaskGroup() as tasks:
            if self.ssd is not None:
                tasks.create_task(self.ssd.run())
            while True:
                self.sweep()
                await asyncio.sleep(_SWEEP_S)

    async def flush(self, *, deadline_s: float) -> int:
        """Write DRAM's blocks to SSD, last used first, until the deadline; returns how many are there."""
        if self.ssd is None:
            return 0
        end_s, written = self._clock.monotonic_s() + deadline_s, 0
        for slot in reversed(self.dram.oldest_first()):
            if self._clock.monotonic_s() >= end_s:
                break
            if slot.header.key not in self.ssd and not await self.ssd.write_through(self.dram.image(slot)):
                break
            written += 1
        return written

    def _is_here(self, key: BlockKey) -> bool:
        return key in self.dram or (self.ssd is not None and key in self.ssd)

    def _reserve_one(self, digest: bytes, tenant: str, block: NewBlock) -> Slot | Refusal:
        key = block_key(digest, block.block_hash)
        if key in self.dram or self.dram.is_being_written(key):
            self.dram.touch([key])
            return Refusal.PRESENT
        now_s = self._clock.monotonic_s()
        header = BlockHeader(
            key=key,
            payload_bytes=block.payload_bytes,
            checksum=block.checksum,
            tenant=tenant,
            saved_unix_s=self._clock.unix_s(),
        )
        return self.dram.reserve(header, expires_s=now_s + RESERVATION_S) or Refusal.NO_SPACE

    def _promote_for(self, lease: Lease, keys: Sequence[BlockKey]) -> list[_Promotion]:
        promotions = []
        pinned = {key: None for key in keys if key in lease.slots}
        for key in keys:
            if key in lease.slots:
                pinned.pop(key, None)
                continue
            promotion = self._promote(key)
            # A chain's beginning is worth more than its end, which gives way where room is short.
            while promotion is None and pinned:
                self.dram.unpin(lease, pinned.popitem()[0])
                promotion = self._promote(key)
            if promotion is None:
                break
            promotion.leases.append(lease)
            promotions.append(promotion)
        return promotions

    def _promote(self, key: BlockKey) -> _Promotion | None:
        promotion = self._promotions.get(key)
        if promotion is not None:
            return promotion
        header = self.ssd.header(key) if self.ssd else None
        if header is None or self.dram.is_being_written(key):
            return None
        # The thread that reads must not outlive its room, so this reservation does not expire.
        slot = self.dram.reserve(header, expires_s=float("inf"))
        if slot is None:
            return None
        promotion = _Promotion(asyncio.create_task(self._read_from_ssd(slot)))
        self._promotions[key] = promotion
        return promotion

    async def _read_from_ssd(self, slot: Slot) -> None:
        assert self.ssd is not None
        key, image = slot.header.key, self.dram.image(slot)
        intact = False
        try:
            intact = await self.ssd.read_into(key, image)
        finally:
            promotion = self._promotions.pop(key)
            if not intact:
                self.dram.abort(slot.generation)
        if not intact:
            return
        write_generation(image, slot.generation)
        self.dram.commit(slot.generation)
        self.counters.promoted += 1
        for lease in promotion.leases:
            self.dram.pin(lease, key)

    def _on_evict(self, slot: Slot, image: memoryview) -> None:
        if self.ssd is not None:
            self.ssd.offer(slot.header.key, image)


async def _wait_for(promotions: Sequence[_Promotion], deadline_s: float) -> int:
    """Wait until all are there or it is time; returns how many are late."""
    if not promotions:
        return 0
    _, late = await asyncio.wait([promotion.task for promotion in promotions], timeout=deadline_s)
    return len(late)
