"""The blocks of one node over both tiers, as the kvstore service holds them.

Invariant: a block is readable only while its slot is pinned by a lease, and a slot in
use is never given away, so no reader sees the bytes of another block under its name.
All methods belong to one event loop; only SSD reads and writes happen elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import (
    BlockKey,
    block_keys,
)
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.dram_tier import DramTier, Lease
from trireme.kvcache.evictions import Evictions, MoveCounters
from trireme.kvcache.fetches import Fetch, Fetches
from trireme.kvcache.look_ahead import LookAhead
from trireme.kvcache.residency_index import ResidencyWriter
from trireme.kvcache.saves import Saves
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.sessions import Sessions
from trireme.kvcache.ssd_books import SsdBooks
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.stored_blocks import Block, Run, runs_of
from trireme.kvcache.tenant_ledger import Shares, TenantLedger
from trireme.policies.kv_items import State
from trireme.runtime.clock import Clock

MAX_LEASE_S = 30.0
MAX_DEADLINE_S = 30.0
SWEEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the blocks besides the sizes of the tiers."""

    ttl_s: float = 3600.0
    """Blocks that nobody used or waited for, for so long, are deleted."""
    shares: Shares = field(default_factory=Shares)


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
        self.saves = Saves(
            self.table, self.dram, self.evictions, self.look_ahead, leading=self.leading, clock=clock
        )
        self.sessions = Sessions(ttl_s=limits.ttl_s)
        self.counters = Counters()
        self.peers = 0
        """Stores of other nodes that can be asked, for the workers to see."""
        self.last_sweep_s = clock.monotonic_s()
        self._clock = clock
        self._limits = limits

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
        ssd = store.ssd = SsdTier(files, quota_bytes=ssd_bytes, clock=clock, owner=store._books())
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
        self.table.touch_chain(runs_of(blocks))
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
        self.table.touch_chain(runs_of(self.leading(keys)))
        return applied

    def sweep(self) -> None:
        """End what outlived its time, and show life."""
        self.last_sweep_s = self._clock.monotonic_s()
        leases, generations = self.dram.outlived(self.last_sweep_s)
        for lease_id in leases:
            self.release(lease_id)
        self.saves.abort(generations)
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

    def _books(self) -> SsdBooks:
        return SsdBooks(self.table, self.arena, self.moved, ttl_s=self._limits.ttl_s, clock=self._clock)

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


async def _wait_for(fetches: Sequence[Fetch], deadline_s: float) -> int:
    """Wait until all are there or it is time; returns how many blocks are late."""
    if not fetches:
        return 0
    await asyncio.wait([fetch.done for fetch in fetches], timeout=deadline_s)
    return sum(len(fetch.leases[-1][1]) for fetch in fetches if not fetch.done.done())
