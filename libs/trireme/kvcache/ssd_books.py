"""What the SSD tier tells, entered into the store's books."""

from __future__ import annotations

from collections.abc import Sequence

from trireme.kvcache.arena import Arena
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.evictions import MoveCounters
from trireme.kvcache.segment_sidecar import FoundRun
from trireme.kvcache.stored_blocks import Block, Run
from trireme.runtime.clock import Clock


class SsdBooks:
    """The `SsdOwner` of one store."""

    def __init__(
        self, table: BlockTable, arena: Arena, counters: MoveCounters, *, ttl_s: float, clock: Clock
    ) -> None:
        self._table = table
        self._arena = arena
        self._counters = counters
        self._ttl_s = ttl_s
        self._clock = clock

    def adopt(self, found: FoundRun) -> Run | None:
        """A run lay on the disk at start: it lives on if its time is not over and it is not here already."""
        # The clock that counts uses starts anew with the machine, and the other one may have been set: what
        # is said to be used in the future was used now.
        idle_s = max(0.0, self._clock.unix_s() - found.used_unix_s)
        if idle_s >= self._ttl_s:
            return None
        blocks = []
        for key, payload_bytes, checksum, offset in found.blocks:
            older = self._table.blocks.get(key)
            if older is not None and older.in_dram:
                continue
            block = Block(key, payload_bytes, checksum)
            block.ssd_offset = offset
            blocks.append(block)
        if not blocks:
            return None
        run = self._table.make_run(found.tenant, blocks, saved_unix_s=found.saved_unix_s)
        self._table.add(run, used_s=self._clock.monotonic_s() - idle_s)
        return run

    def ssd_adopted(self, runs: Sequence[Run]) -> None:
        """The tier has noted where adopted runs lie."""
        self._table.enter_ssd_at_start(runs)

    def ssd_lost(self, run: Run) -> None:
        """A run's copy is no longer on SSD."""
        self._table.leave_ssd(run)

    def block_is_corrupt(self, block: Block) -> None:
        """A block's bytes in DRAM were not sound when they were to be written."""
        self._counters.dram_corrupt += 1
        self._table.drop_block(block)

    def ssd_block_is_corrupt(self, block: Block) -> None:
        """A block's bytes on SSD were not sound when they were to be moved."""
        self._counters.ssd_corrupt += 1
        self._table.drop_block(block)

    def ssd_turned(self, is_on: bool) -> None:
        """Workers look at what is on SSD only while it can be read."""
        self._arena.show_ssd(is_on)
