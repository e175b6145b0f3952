"""The look-ahead loop: hears the queue, asks `policies/kv_tiering` what should be where, has it carried out.

It plans when the queue changes, when room in DRAM runs low, when a move ends, and every 50 ms while
jobs wait or something moves. A plan costs by what changes, not by what is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trireme.kvcache.block_codec import BlockKey
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.dram_tier import DramTier
from trireme.kvcache.evictions import Evictions
from trireme.kvcache.fetches import Fetches
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.waiting_jobs import WaitingJob, WaitingJobs
from trireme.policies.kv_items import State
from trireme.policies.kv_tiering import Action, Capacity, Command, plan
from trireme.runtime.clock import Clock

PENDING_S = 0.05
IDLE_S = 0.5
LOW_FREE = 0.10
"""Share of DRAM that is kept free for what comes in."""
DROP_LOW_FREE = 0.01
"""The same where what leaves DRAM is lost at once, so that little is gained by letting it leave early."""
BATCH_FREE = 0.05
BATCH_BYTES = 8 * 2**20
"""Evicting goes on for this share of DRAM and this many bytes at most, so that no plan is long."""
LEAST_S = 0.005
"""Between two plans, however fast the queue changes."""


class LookAhead:
    """Plans for one store."""

    def __init__(
        self,
        table: BlockTable,
        dram: DramTier,
        fetches: Fetches,
        evictions: Evictions,
        ssd: Callable[[], SsdTier | None],
        *,
        clock: Clock,
    ) -> None:
        self._table = table
        self._dram = dram
        self._fetches = fetches
        self._evictions = evictions
        self._ssd = ssd
        self._clock = clock
        self._wake = asyncio.Event()
        self.jobs = WaitingJobs()
        self.outlived_blocks = 0
        """Blocks deleted because nobody used them for their time to live, since the start."""

    @property
    def is_busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._fetches.running or self._evictions.writes)

    def hear(
        self, source: str, order: Sequence[WaitingJob], chains: Mapping[str, Sequence[BlockKey]]
    ) -> None:
        """A source's queue now (see `WaitingJobs.hear`)."""
        self.jobs.hear(source, order, chains, now_s=self._clock.monotonic_s())
        self._wake.set()

    def note_room(self) -> None:
        """DRAM has less room now: plan at once where it is short."""
        if self._dram.free_bytes < self._capacity().low_free_bytes:
            self._wake.set()

    def replan(self) -> int:
        """Plan once and begin what it says; returns the number of commands."""
        now_s = self._clock.monotonic_s()
        queue = self.jobs.refresh(self._table.blocks, now_s=now_s)
        if queue is not None:
            self._table.index.follow(queue, now_s=now_s)
        commands = plan(
            self._table.index, self._capacity(), now_s=now_s, dram_free_bytes=self._dram.free_bytes
        )
        self._carry_out(commands)
        return len(commands)

    async def settle(self) -> None:
        """Wait until nothing is on its way."""
        while self.is_busy:
            waiting: list[asyncio.Future[Any]] = [*self._evictions.writes.values()]
            waiting += [fetch.done for fetch in self._fetches.running.values()]
            await asyncio.wait(waiting)
            await asyncio.sleep(0)

    async def run(self) -> None:
        """Plan for ever."""
        while True:
            is_pending = bool(self.jobs) or self.is_busy
            try:
                async with asyncio.timeout(PENDING_S if is_pending else IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            self.replan()
            await asyncio.sleep(LEAST_S)

    def _carry_out(self, commands: Iterable[Command[int]]) -> None:
        """Begin what a plan says; what does not go now is planned again."""
        now_s = self._clock.monotonic_s()
        for command in commands:
            run = self._table.runs.get(command.item_id)
            if run is None or run.state is not State.RESIDENT or run.pins:
                continue
            if command.action is Action.FETCH:
                self._fetches.fetch(run, is_ahead=True)
            elif command.action is Action.EVICT:
                self._evictions.evict(run)
            else:
                if run.expires_s <= now_s:
                    self.outlived_blocks += len(run.blocks)
                self._evictions.drop(run, from_dram=command.from_dram, from_ssd=command.from_ssd)

    def _capacity(self) -> Capacity:
        ssd = self._ssd()
        is_writable = ssd is not None and ssd.is_writable
        dram_bytes = self._dram.used_bytes + self._dram.free_bytes
        low_free = LOW_FREE if is_writable else DROP_LOW_FREE
        return Capacity(
            dram_bytes=dram_bytes,
            ssd_bytes=ssd.segments.live_capacity_bytes if ssd is not None else 0,
            is_ssd_writable=is_writable,
            low_free=low_free,
            high_free=low_free + min(BATCH_FREE, BATCH_BYTES / dram_bytes),
        )
