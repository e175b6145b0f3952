"""Runs on their way out of DRAM: written to SSD and let go, or put out at once for want of room.

What goes is decided by `policies/kv_tiering` and told by `LookAhead`; only where that comes too late, or a
tenant exceeds its share, is it decided here, by the same order of next use.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.dram_tier import DramTier
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.stored_blocks import Block, Run
from trireme.policies.kv_items import State

_LEAST_WRITING_BYTES = 32 * 2**20
_LOOKED_AT = 256
"""Runs of a tenant that are looked at to bring it into its share."""


@dataclass(slots=True)
class MoveCounters:
    """What moved since the start, in blocks."""

    promoted: int = 0
    fetched_ahead: int = 0
    evicted: int = 0
    unsaved: int = 0
    """Put out of DRAM without having been written to the SSD tier that there is."""
    dram_corrupt: int = 0
    ssd_corrupt: int = 0
    ssd_evicted: int = 0


class Evictions:
    """Takes runs out of one arena, and writes them to one SSD tier."""

    def __init__(
        self, table: BlockTable, dram: DramTier, ssd: Callable[[], SsdTier | None], counters: MoveCounters
    ) -> None:
        self._table = table
        self._dram = dram
        self._ssd = ssd
        self._counters = counters
        self._most_writing_bytes = max(_LEAST_WRITING_BYTES, dram.capacity_bytes // 8)
        self.writes: dict[int, asyncio.Task[bool]] = {}
        """Runs that are being written to SSD, or wait for it, by number."""
        self.writing_bytes = 0
        """Their bytes."""

    @property
    def writing_blocks(self) -> int:
        """Blocks that are being written to SSD, or wait for it."""
        runs = (self._table.runs.get(number) for number in self.writes)
        return sum(len(run.blocks) for run in runs if run is not None)

    @property
    def can_write(self) -> bool:
        """Whether there is an SSD tier that takes blocks."""
        ssd = self._ssd()
        return ssd is not None and ssd.is_writable

    def evict(self, run: Run) -> None:
        """Take a run out of DRAM, after writing it where SSD does not have it."""
        if run.on_ssd:
            self._counters.evicted += len(run.blocks)
            self._table.leave_dram(run)
        elif self.writing_bytes >= self._most_writing_bytes:
            return
        elif self.write(run, then_leave=True) is None and self.can_write:
            # The tenant's share of the SSD is full of what it uses now.
            self._lose(run)

    def write(self, run: Run, *, then_leave: bool = False) -> asyncio.Task[bool] | None:
        """Write a run to SSD while it stays readable; None where that cannot be now."""
        ssd = self._ssd()
        if ssd is None or not ssd.is_writable or run.on_ssd or run.state is not State.RESIDENT:
            return None
        if not self._make_ssd_share(run):
            return None
        run.state = State.EVICTING
        for block in run.blocks:
            block.pins += 1
        self._table.tell(run)
        self.writing_bytes += run.size_bytes
        task = asyncio.create_task(self._write(ssd, run, then_leave))
        self.writes[run.number] = task
        return task

    def drop(self, run: Run, *, from_dram: bool, from_ssd: bool) -> None:
        """Delete copies of a run that nobody uses."""
        ssd = self._ssd()
        if from_ssd and run.on_ssd and ssd is not None:
            self._counters.ssd_evicted += len(run.blocks)
            ssd.drop(run)
            self._table.leave_ssd(run)
        if from_dram and run.in_dram:
            self._counters.evicted += len(run.blocks)
            self._table.leave_dram(run)

    async def prepare(self, size_bytes: int, *, deadline_s: float) -> None:
        """Wait until so much is free in DRAM, where writing runs to SSD brings that about; at most so long.

        Without it what comes in faster than the disk takes it would cost the oldest runs, unwritten.
        """
        ssd, loop = self._ssd(), asyncio.get_running_loop()
        end_s = loop.time() + deadline_s
        if ssd is None or size_bytes > self._dram.capacity_bytes // 2:
            return
        while ssd.is_writable:
            missing_bytes = size_bytes - self._dram.free_bytes
            left_s = end_s - loop.time()
            if missing_bytes <= 0 or left_s <= 0:
                return
            self._evict_farthest(missing_bytes - self.writing_bytes)
            if not self.writes:
                return
            await asyncio.wait(self.writes.values(), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    def place(self, block: Block) -> bool:
        """A slot for a block, where needed by putting others out at once; False where none can be had."""
        while not self._dram.place(block):
            if not self._put_out(block.image_bytes, is_urgent=False):
                return False
        return True

    def place_all(self, blocks: Sequence[Block], *, may_put_out: bool) -> bool:
        """Slots for several blocks, or none at all; `may_put_out`: others may be put out at once for them."""
        for number, block in enumerate(blocks):
            while not self._dram.place(block):
                if may_put_out and self._put_out(block.image_bytes, is_urgent=True):
                    continue
                for placed in blocks[:number]:
                    self._dram.displace(placed)
                return False
        return True

    def make_share(self, tenant: str, more_bytes: int) -> bool:
        """Keep a tenant within its share of DRAM: its own oldest runs leave, nobody else's.

        What SSD does not have is written there while that keeps up, and else is lost. False where what it
        uses now fills its share.
        """
        ledger = self._table.dram_ledger
        if not ledger.is_bounded(tenant):
            return True
        excess_bytes = ledger.excess_bytes(tenant, more_bytes)
        for run in (
            list(itertools.islice(ledger.oldest_first(tenant), _LOOKED_AT)) if excess_bytes > 0 else ()
        ):
            if excess_bytes <= 0:
                break
            if run.state is State.EVICTING:
                excess_bytes -= run.size_bytes
            if run.pins or run.state is not State.RESIDENT:
                continue
            excess_bytes -= run.size_bytes
            ledger.over_quota[tenant] += len(run.blocks)
            self.evict(run)
            if run.in_dram and run.state is State.RESIDENT:
                self._lose(run)
        return excess_bytes <= 0

    def cancel(self) -> None:
        """Stop waiting for writes that may never end."""
        for task in self.writes.values():
            task.cancel()

    async def _write(self, ssd: SsdTier, run: Run, then_leave: bool) -> bool:
        loop = asyncio.get_running_loop()
        returned: asyncio.Future[None] = loop.create_future()
        blocks, size_bytes, use_s = list(run.blocks), run.size_bytes, run.use_s
        try:
            written = await ssd.write(
                run, self._dram.images(blocks), when_returned=lambda: returned.set_result(None)
            )
            # After a hang a thread may read the memory still: until it is back the slots stay pinned.
            await returned
        finally:
            del self.writes[run.number]
            self.writing_bytes -= size_bytes
        for block in blocks:
            if block.run is run:
                block.pins -= 1
            else:
                self._dram.unpin(block)
        run.state = State.RESIDENT
        if not run.blocks:
            return False
        if written:
            self._table.enter_ssd(run)
        else:
            self._table.tell(run)
        if written and then_leave and not run.pins and run.use_s == use_s:
            self._counters.evicted += len(run.blocks)
            self._table.leave_dram(run)
        return written

    def _make_ssd_share(self, run: Run) -> bool:
        ledger = self._table.ssd_ledger
        excess_bytes = ledger.excess_bytes(run.tenant, run.size_bytes)
        if excess_bytes <= 0:
            return True
        for older in list(itertools.islice(ledger.oldest_first(run.tenant), _LOOKED_AT)):
            if excess_bytes <= 0:
                break
            if older.pins or older.state is not State.RESIDENT:
                continue
            excess_bytes -= older.size_bytes
            ledger.over_quota[run.tenant] += len(older.blocks)
            self.drop(older, from_dram=False, from_ssd=True)
        return excess_bytes <= 0

    def _evict_farthest(self, size_bytes: int) -> None:
        index, chosen = self._table.index, list[Run]()
        for key in reversed(index.dram_victims):
            if size_bytes <= 0:
                break
            chosen.append(self._table.runs[index.record(key[3]).item.item_id])
            size_bytes -= chosen[-1].size_bytes
        for run in chosen:
            self.evict(run)

    def _put_out(self, slot_bytes: int, *, is_urgent: bool) -> bool:
        """Free at least one slot, or a slab that then can serve this size; False where nothing may go."""
        if slot_bytes > self._dram.largest_slot_bytes:
            return False
        index, tried = self._table.index, set[int]()
        # What SSD has costs nothing to put out; of the rest the farthest use goes first.
        for key in itertools.chain(reversed(index.duplicates), reversed(index.dram_victims)):
            run = self._table.runs[index.record(key[3]).item.item_id]
            if key[0] < math.inf and not (is_urgent or run.on_ssd):
                continue
            if any(block.image_bytes == slot_bytes for block in run.blocks):
                self._make_way(run, slot_bytes)
                return True
            slab = self._dram.slab_of(run.blocks[-1])
            if slab not in tried and (mates := self._whole_slab(run.blocks[-1])):
                for mate in mates:
                    if mate.run is not None and mate.run.in_dram:
                        self._make_way(mate.run, mate.image_bytes, mate)
                return True
            tried.add(slab)
        return False

    def _whole_slab(self, block: Block) -> list[Block]:
        mates = self._dram.slab_mates(block)
        free = all(
            mate.run is not None and not mate.pins and not mate.run.pins and mate.run.state is State.RESIDENT
            for mate in mates
        )
        return mates if free else []

    def _make_way(self, run: Run, slot_bytes: int, block: Block | None = None) -> None:
        """Free the slots of a run that SSD has too; of another its last slot of this size, or this one."""
        if run.on_ssd:
            self._counters.evicted += len(run.blocks)
            self._table.leave_dram(run)
            return
        self._lose_block(block or next(b for b in reversed(run.blocks) if b.image_bytes == slot_bytes))

    def _lose(self, run: Run) -> None:
        for block in list(run.blocks):
            self._lose_block(block)

    def _lose_block(self, block: Block) -> None:
        self._counters.evicted += 1
        self._counters.unsaved += self._ssd() is not None
        self._table.drop_block(block)
