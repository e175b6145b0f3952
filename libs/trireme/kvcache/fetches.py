"""Runs on their way from SSD to DRAM, and the leases that wait for them.

Nothing waits here: a thousand fetches are a thousand callbacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from trireme.kvcache.block_codec import BlockKey, write_generation
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.disk_threads import DiskCall
from trireme.kvcache.dram_tier import DramTier, Lease
from trireme.kvcache.evictions import Evictions, MoveCounters
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.stored_blocks import NOWHERE, Block, Run
from trireme.policies.kv_items import State


class Fetch:
    """One run on its way from SSD to DRAM, and the leases that wait for it."""

    __slots__ = ("blocks", "done", "is_ahead", "leases", "run", "size_bytes")

    def __init__(self, run: Run, done: asyncio.Future[None], *, is_ahead: bool) -> None:
        self.run = run
        self.blocks = list(run.blocks)
        self.size_bytes = run.size_bytes
        self.done = done
        """Resolved when the run is there, or will not come."""
        self.is_ahead = is_ahead
        self.leases: list[tuple[Lease, Sequence[BlockKey]]] = []


class Fetches:
    """Brings runs into one arena from one SSD tier, and keeps blocks in place for readers."""

    def __init__(
        self,
        table: BlockTable,
        dram: DramTier,
        ssd: Callable[[], SsdTier | None],
        evictions: Evictions,
        counters: MoveCounters,
    ) -> None:
        self._table = table
        self._dram = dram
        self._ssd = ssd
        self._evictions = evictions
        self._counters = counters
        self.running: dict[int, Fetch] = {}
        """By number of the run."""

    def fetch(self, run: Run, *, is_ahead: bool = False, may_put_out: bool = False) -> Fetch | None:
        """Bring a run into DRAM, or join those who do; None where there is no room, or no SSD to read.

        `may_put_out`: other runs may be put out at once for it.
        """
        if (fetch := self.running.get(run.number)) is not None:
            return fetch
        ssd = self._ssd()
        if ssd is None or not ssd.serving or not run.on_ssd or run.state is not State.RESIDENT:
            return None
        # From here on nobody drops it to make room, not even for itself.
        run.state = State.FETCHING
        if not (
            self._evictions.make_share(run.tenant, run.size_bytes)
            and self._evictions.place_all(run.blocks, may_put_out=may_put_out)
        ):
            run.state = State.RESIDENT
            return None
        self._table.dram_ledger.grow(run.tenant, run.size_bytes)
        for block in run.blocks:
            block.pins += 1
        self._table.tell(run)
        fetch = Fetch(run, asyncio.get_running_loop().create_future(), is_ahead=is_ahead)
        self.running[run.number] = fetch
        call = ssd.begin_read(fetch.blocks, self._dram.images(fetch.blocks))
        call.when_returned(lambda: self._fetched(fetch, call))
        call.outcome.add_done_callback(lambda _: self._wake(fetch))
        return fetch

    def pin(self, lease: Lease, blocks: Iterable[Block | None]) -> None:
        """Put blocks that are in DRAM under a lease that has not ended."""
        if not self._dram.holds(lease):
            return
        runs: list[Run] = []
        for block in blocks:
            if block is None or not block.in_dram or block.key in lease.blocks:
                continue
            assert block.run is not None
            lease.blocks[block.key] = block
            block.pins += 1
            block.run.pins += 1
            if not runs or runs[-1] is not block.run:
                runs.append(block.run)
        for run in runs:
            self._table.tell(run)

    def unpin(self, blocks: Iterable[Block]) -> None:
        """Take blocks out of a lease."""
        runs: list[Run] = []
        for block in blocks:
            run = block.run
            self._dram.unpin(block)
            if run is not None:
                run.pins -= 1
                if not run.pins and (not runs or runs[-1] is not run):
                    runs.append(run)
        for run in runs:
            self._table.tell(run)

    def _fetched(self, fetch: Fetch, call: DiskCall[list[bool]]) -> None:
        # No thread writes to the slots any more: before that they could not be given to others.
        run = fetch.run
        del self.running[run.number]
        self._table.dram_ledger.shrink(run.tenant, fetch.size_bytes)
        failed = call.is_given_up or call.outcome.exception() is not None
        sound = [False] * len(fetch.blocks) if failed else call.outcome.result()
        here = []
        for block, is_sound in zip(fetch.blocks, sound, strict=True):
            if block.run is not run:
                self._dram.unpin(block)
                continue
            block.pins -= 1
            if is_sound:
                write_generation(self._dram.image(block), block.generation)
                here.append(block)
            else:
                self._dram.displace(block)
        run.state = State.RESIDENT
        for block in [] if failed else [b for b in fetch.blocks if b.run is run and b.offset == NOWHERE]:
            self._counters.ssd_corrupt += 1
            self._table.drop_block(block)
        if here:
            self._table.enter_dram(run)
            self._counters.promoted += len(here)
            self._counters.fetched_ahead += len(here) if fetch.is_ahead else 0
            for lease, keys in fetch.leases:
                self.pin(lease, [self._table.blocks.get(key) for key in keys])
        elif run.blocks:
            self._table.settle(run)
        self._wake(fetch)

    def _wake(self, fetch: Fetch) -> None:
        if not fetch.done.done():
            fetch.done.set_result(None)
