"""The blocks of one node over both tiers, as the kvstore service holds them.

Invariant: a block is readable only while its slot is pinned by a lease, and a slot in
use is never given away, so no reader sees the bytes of another block under its name.
All methods belong to one event loop; only SSD reads and writes happen elsewhere.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from trireme.errors import InvalidRequest
from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import (
    HASH_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockKey,
    block_key,
    block_keys,
    image_bytes,
    namespace_digest,
    tenant_label,
)
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.dram_tier import DramTier, Lease
from trireme.kvcache.evictions import Evictions, MoveCounters
from trireme.kvcache.fetches import Fetch, Fetches
from trireme.kvcache.look_ahead import LookAhead
from trireme.kvcache.residency_index import ResidencyWriter
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.segment_sidecar import FoundRun
from trireme.kvcache.sessions import Sessions
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.stored_blocks import MAX_RUN_BYTES, Block, Run, cut_into_runs
from trireme.kvcache.tenant_ledger import Shares, TenantLedger
from trireme.policies.kv_items import State
from trireme.runtime.clock import Clock

RESERVATION_S = 30.0
"""A writer that has not committed by then is taken for dead."""
MAX_LEASE_S = 30.0
MAX_DEADLINE_S = 30.0
SWEEP_S = 0.25
_ROOM_S = 0.25
"""A writer waits no longer for older blocks to be written to SSD; then they are dropped."""
_RUNS_IN_DRAM = 32
"""A run takes at most this part of DRAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the blocks besides the sizes of the tiers."""

    ttl_s: float = 3600.0
    """Blocks that nobody used or waited for, for so long, are deleted."""
    shares: Shares = field(default_factory=Shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBlock:
    """A block to be saved."""

    block_hash: bytes
    payload_bytes: int


class Refusal(enum.Enum):
    """Why no room was reserved."""

    PRESENT = "present"
    NO_SPACE = "no_space"


@dataclass(frozen=True, slots=True)
class Acquired:
    """The leading blocks of a chain; `lease_id` is 0 where there are none."""

    blocks: list[Block]
    lease_id: int
    lease_s: float


@dataclass(slots=True)
class Counters:
    """What was asked since the start, in blocks."""

    lookups: int = 0
    matched: int = 0
    dram_hits: int = 0
    ssd_hits: int = 0
    misses: int = 0
    late: int = 0
    committed: int = 0


class TieredStore:
    """Blocks in an arena and, where there is one, on an SSD."""

    def __init__(self, arena: Arena, *, ssd_bytes: int, clock: Clock, limits: Limits) -> None:
        self.arena = arena
        self.dram = DramTier(arena)
        self.ssd: SsdTier | None = None
        self.residency = ResidencyWriter(arena.index)
        self.table = BlockTable(
            self.dram,
            self.residency,
            dram_ledger=TenantLedger(limits.shares, capacity_bytes=self.dram.capacity_bytes),
            ssd_ledger=TenantLedger(limits.shares, capacity_bytes=ssd_bytes),
            ttl_s=limits.ttl_s,
            clock=clock,
        )
        self.moved = MoveCounters()
        self.evictions = Evictions(self.table, self.dram, lambda: self.ssd, self.moved)
        self.fetches = Fetches(self.table, self.dram, lambda: self.ssd, self.evictions, self.moved)
        self.look_ahead = LookAhead(
            self.table, self.dram, self.fetches, self.evictions, lambda: self.ssd, clock=clock
        )
        self.sessions = Sessions(ttl_s=limits.ttl_s)
        self.counters = Counters()
        self.peers = 0
        """Stores of other nodes that can be asked, for the workers to see."""
        self.last_sweep_s = clock.monotonic_s()
        self._clock = clock
        self._limits = limits
        self._most_run_bytes = min(MAX_RUN_BYTES, self.dram.capacity_bytes // _RUNS_IN_DRAM)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        arena: Arena,
        files: SegmentFiles | None,
        *,
        ssd_bytes: int = 0,
        clock: Clock,
        limits: Limits | None = None,
    ) -> AsyncIterator[TieredStore]:
        """A store over both tiers, or over DRAM alone where there are no `files`."""
        store = cls(arena, ssd_bytes=ssd_bytes, clock=clock, limits=limits or Limits())
        if files is None:
            yield store
            return
        ssd = store.ssd = SsdTier(files, quota_bytes=ssd_bytes, clock=clock, owner=store)
        store.table.segments = ssd.segments
        async with ssd.in_use():
            try:
                yield store
            finally:
                store.evictions.cancel()

    def match(self, namespace: str, block_hashes: bytes) -> tuple[int, int]:
        """Leading blocks of a chain that some tier holds, and that DRAM holds.

        Raises:
            InvalidRequest: `block_hashes` is no multiple of 16 bytes.
        """
        keys = block_keys(namespace, block_hashes)
        here = self.leading(keys)
        self.counters.lookups += len(keys)
        self.counters.matched += len(here)
        return len(here), len(list(itertools.takewhile(lambda block: block.in_dram, here)))

    def now_s(self) -> float:
        """The time, as leases and reservations count it."""
        return self._clock.monotonic_s()

    def leading(self, keys: Iterable[BlockKey]) -> list[Block]:
        """The blocks of a chain up to the first that cannot be read here."""
        here, get = [], self.table.blocks.get
        serving = self.ssd is not None and self.ssd.serving
        for key in keys:
            block = get(key)
            if block is None or not (serving or block.in_dram):
                break
            here.append(block)
        return here

    async def prepare_room(self, blocks: Sequence[NewBlock]) -> None:
        """Wait a moment for room where blocks come in faster than the disk takes older ones."""
        size_bytes = sum(image_bytes(block.payload_bytes) for block in blocks)
        if size_bytes > self.dram.free_bytes:
            await self.evictions.prepare(size_bytes, deadline_s=_ROOM_S)

    def reserve(self, namespace: str, tenant: str, blocks: Sequence[NewBlock]) -> list[Block | Refusal]:
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
        expires_s = self._clock.monotonic_s() + RESERVATION_S
        keys = [block_key(digest, block.block_hash) for block in blocks]
        # What is here is used now; noted first, or room for the rest would be made from it.
        present = [found for key in keys for found in self.leading([key])]
        self.table.touch_chain(_runs_of(present))
        held = {block.key for block in present}
        outcomes: list[Block | Refusal] = []
        for key, wanted in zip(keys, blocks, strict=True):
            if key in held or self.dram.is_being_written(key):
                outcomes.append(Refusal.PRESENT)
            else:
                block_room = self.reserve_key(key, label, wanted.payload_bytes, expires_s)
                outcomes.append(block_room or Refusal.NO_SPACE)
        self.look_ahead.note_room()
        return outcomes

    def reserve_key(self, key: BlockKey, tenant: str, payload_bytes: int, expires_s: float) -> Block | None:
        """Room for one block that is neither here nor being written; None where there is none."""
        block = Block(key, payload_bytes, 0)
        if not self.evictions.make_share(tenant, block.image_bytes) or not self.evictions.place(block):
            return None
        self.table.dram_ledger.grow(tenant, block.image_bytes)
        self.dram.reserve(block, tenant=tenant, expires_s=expires_s)
        return block

    def commit(self, generations: Sequence[int], checksums: Sequence[int]) -> int:
        """Make reserved blocks readable, first of the chain first; returns how many still were reserved.

        Raises:
            InvalidRequest: there are not as many checksums as generations.
        """
        if len(generations) != len(checksums):
            raise InvalidRequest(
                f"{len(generations)} generations come with {len(checksums)} checksums", param="checksums"
            )
        by_tenant: dict[str, list[Block]] = {}
        for generation, checksum in zip(generations, checksums, strict=True):
            reservation = self.dram.end_reservation(generation)
            if reservation is None:
                continue
            block = reservation.block
            block.checksum = checksum
            self.table.dram_ledger.shrink(reservation.tenant, block.image_bytes)
            by_tenant.setdefault(reservation.tenant, []).append(block)
        saved_unix_s = self._clock.unix_s()
        runs: list[Run] = []
        for tenant, blocks in by_tenant.items():
            for part in cut_into_runs(blocks, max_run_bytes=self._most_run_bytes):
                runs.append(self.table.make_run(tenant, part, saved_unix_s=saved_unix_s))
        for run in reversed(runs):
            for position, block in enumerate(run.blocks):
                self.dram.seal(block, position=position)
            self.table.add(run, used_s=self.table.now_s())
            self.table.enter_dram(run)
        committed = sum(len(run.blocks) for run in runs)
        self.counters.committed += committed
        return committed

    def abort(self, generations: Sequence[int]) -> int:
        """Give reserved room back; returns how many still were reserved."""
        aborted = 0
        for generation in generations:
            reservation = self.dram.end_reservation(generation)
            if reservation is not None:
                self.table.dram_ledger.shrink(reservation.tenant, reservation.block.image_bytes)
                self.dram.displace(reservation.block)
                aborted += 1
        return aborted

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
        here = self.leading(keys)
        # All that is in DRAM is pinned first, or room for the rest would be made from it.
        self.fetches.pin(lease, here)
        in_dram = set(lease.blocks)
        fetches = self._fetch_for(lease, here)
        try:
            late = await _wait_for(fetches, deadline_s)
        except asyncio.CancelledError:
            self.release(lease.lease_id)
            raise
        found = list(itertools.takewhile(lease.blocks.__contains__, keys))
        from_dram = len(in_dram.intersection(found))
        self.counters.dram_hits += from_dram
        self.counters.ssd_hits += len(found) - from_dram
        self.counters.misses += len(keys) - len(found)
        self.counters.late += late
        if not found:
            self.release(lease.lease_id)
            return Acquired([], 0, 0.0)
        blocks = [lease.blocks[key] for key in found]
        self.table.touch_chain(_runs_of(blocks))
        lease.expires_s = self._clock.monotonic_s() + lease_s
        return Acquired(blocks, lease.lease_id, lease_s)

    def release(self, lease_id: int, *, corrupt_generations: Sequence[int] = ()) -> bool:
        """End a lease; blocks reported corrupt are forgotten. False where it had ended."""
        lease = self.dram.end_lease(lease_id)
        if lease is None:
            return False
        corrupt = set(corrupt_generations)
        blocks = list(lease.blocks.values())
        for block in blocks if corrupt else ():
            if block.generation in corrupt and block.run is not None:
                self.moved.dram_corrupt += 1
                self.table.lose_dram_copy(block)
        self.fetches.unpin(blocks)
        return True

    def note_session(
        self, tenant: str, session_id: str, namespace: str, block_hashes: bytes, *, version: int
    ) -> bool:
        """A conversation's turn ended with this chain (see `Sessions.note`); its blocks were used now.

        Raises:
            InvalidRequest: `block_hashes` is no multiple of 16 bytes.
        """
        keys = block_keys(namespace, block_hashes)
        now_s = self._clock.monotonic_s()
        applied = self.sessions.note(tenant, session_id, namespace, keys, version=version, now_s=now_s)
        self.table.touch_chain(_runs_of(self.leading(keys)))
        return applied

    def sweep(self) -> None:
        """End what outlived its time, and show life."""
        self.last_sweep_s = self._clock.monotonic_s()
        leases, generations = self.dram.outlived(self.last_sweep_s)
        for lease_id in leases:
            self.release(lease_id)
        self.abort(generations)
        self.dram.expired += len(leases) + len(generations)
        self.sessions.expire(self.last_sweep_s)
        self.arena.beat(time.monotonic_ns(), peers=self.peers)

    async def run(self) -> None:
        """Sweep, plan, and look after the disk, for ever."""
        async with asyncio.TaskGroup() as tasks:
            if self.ssd is not None:
                tasks.create_task(self.ssd.run())
            tasks.create_task(self.look_ahead.run())
            while True:
                self.sweep()
                await asyncio.sleep(SWEEP_S)

    async def flush(self, *, deadline_s: float) -> int:
        """Write DRAM's blocks to SSD, last used first, until the deadline; returns how many are there."""
        if self.ssd is None:
            return 0
        end_s = self._clock.monotonic_s() + deadline_s
        written = 0
        for run in self.newest_runs():
            left_s = end_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            if not run.on_ssd and run.state is State.RESIDENT:
                task = self.evictions.write(run)
                if task is not None:
                    await asyncio.wait({task}, timeout=left_s)
                elif not self.evictions.can_write:
                    break
            written += len(run.blocks) if run.on_ssd else 0
        return written

    def newest_runs(self) -> list[Run]:
        """What is in DRAM, last used first."""
        runs = [run for run in self.table.runs.values() if run.in_dram]
        return sorted(runs, key=lambda run: -run.use_s)

    def adopt(self, found: FoundRun) -> Run | None:
        """A run lay on the disk at start: it lives on if its time is not over and it is not here already."""
        # The clock that counts uses starts anew with the machine, and the other one may have been set: what
        # is said to be used in the future was used now.
        idle_s = max(0.0, self._clock.unix_s() - found.used_unix_s)
        if idle_s >= self._limits.ttl_s:
            return None
        blocks = []
        for key, payload_bytes, checksum, offset in found.blocks:
            older = self.table.blocks.get(key)
            if older is not None and older.in_dram:
                continue
            block = Block(key, payload_bytes, checksum)
            block.ssd_offset = offset
            blocks.append(block)
        if not blocks:
            return None
        run = self.table.make_run(found.tenant, blocks, saved_unix_s=found.saved_unix_s)
        self.table.add(run, used_s=self._clock.monotonic_s() - idle_s)
        return run

    def ssd_adopted(self, runs: Sequence[Run]) -> None:
        """The tier has noted where adopted runs lie."""
        self.table.enter_ssd_at_start(runs)

    def ssd_lost(self, run: Run) -> None:
        """A run's copy is no longer on SSD."""
        self.table.leave_ssd(run)

    def block_is_corrupt(self, block: Block) -> None:
        """A block's bytes in DRAM were not sound when they were to be written."""
        self.moved.dram_corrupt += 1
        self.table.drop_block(block)

    def ssd_turned(self, is_on: bool) -> None:
        """Workers look at what is on SSD only while it can be read."""
        self.arena.show_ssd(is_on)

    def _fetch_for(self, lease: Lease, blocks: Sequence[Block]) -> list[Fetch]:
        fetches: list[Fetch] = []
        wanted: dict[int, list[Block]] = {}
        for block in blocks:
            if block.key not in lease.blocks and block.run is not None:
                wanted.setdefault(block.run.number, []).append(block)
        pinned = [block for block in blocks if block.key in lease.blocks]
        for number, run_blocks in wanted.items():
            run = self.table.runs.get(number)
            if run is None:
                break
            fetch = self.fetches.fetch(run, may_put_out=True)
            # A chain's beginning is worth more than its end, which gives way where room is short.
            while fetch is None and pinned and run.on_ssd:
                last = pinned.pop()
                del lease.blocks[last.key]
                self.fetches.unpin([last])
                fetch = self.fetches.fetch(run, may_put_out=True)
            if fetch is None:
                break
            fetch.leases.append((lease, [block.key for block in run_blocks]))
            fetches.append(fetch)
        return fetches


def _runs_of(blocks: Iterable[Block]) -> list[Run]:
    runs: dict[int, Run] = {}
    for block in blocks:
        if block.run is not None:
            runs.setdefault(block.run.number, block.run)
    return list(runs.values())


async def _wait_for(fetches: Sequence[Fetch], deadline_s: float) -> int:
    """Wait until all are there or it is time; returns how many blocks are late."""
    if not fetches:
        return 0
    await asyncio.wait([fetch.done for fetch in fetches], timeout=deadline_s)
    return sum(len(fetch.leases[-1][1]) for fetch in fetches if not fetch.done.done())
