"""All blocks of a store, and everyone who must hear when one moves.

The one place where a run enters or leaves a tier: the planner's index, the workers' residency
index, the tenants' ledgers and the slots change together here, so that they never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

from trireme.kvcache.block_codec import BlockKey
from trireme.kvcache.dram_tier import DramTier
from trireme.kvcache.residency_index import ResidencyWriter
from trireme.kvcache.segments import Segments
from trireme.kvcache.stored_blocks import NOWHERE, Block, Run
from trireme.kvcache.tenant_ledger import TenantLedger
from trireme.policies.kv_items import Item, State, TierIndex
from trireme.runtime.clock import Clock

_DRAM = 1
_SSD = 2
_TICK_S = 1e-6


class BlockTable:
    """Blocks by key, runs by number."""

    def __init__(
        self,
        dram: DramTier,
        residency: ResidencyWriter,
        *,
        dram_ledger: TenantLedger,
        ssd_ledger: TenantLedger,
        ttl_s: float,
        clock: Clock,
    ) -> None:
        self._dram = dram
        self._residency = residency
        self._ttl_s = ttl_s
        self._clock = clock
        self._last_use_s = 0.0
        self._last_number = 0
        self.segments: Segments | None = None
        """Of the SSD tier, where there is one."""
        self.blocks: dict[BlockKey, Block] = {}
        self.runs: dict[int, Run] = {}
        self.index: TierIndex[int] = TierIndex()
        """Runs, by number, as the planner sees them."""
        self.dram_ledger = dram_ledger
        self.ssd_ledger = ssd_ledger
        self.dram_blocks = 0

    def make_run(self, tenant: str, blocks: Sequence[Block], *, saved_unix_s: float) -> Run:
        """A run of blocks that are in no tier yet."""
        self._last_number += 1
        run = Run(self._last_number, tenant, blocks, saved_unix_s=saved_unix_s)
        self._use(run, self.now_s())
        return run

    def add(self, run: Run, *, used_s: float | None = None) -> None:
        """A run's blocks can be found from now on. Blocks of those names that were here are dropped."""
        if used_s is not None:
            self._use(run, used_s)
        self.runs[run.number] = run
        for block in run.blocks:
            older = self.blocks.get(block.key)
            if older is not None:
                self.drop_block(older)
            self.blocks[block.key] = block

    def enter_dram(self, run: Run) -> None:
        """All blocks of a run can be read from DRAM."""
        before = _tiers(run)
        run.in_dram = True
        self.dram_ledger.add(run)
        self.dram_blocks += len(run.blocks)
        self._moved(run, before)

    def leave_dram(self, run: Run) -> None:
        """A run gives its slots back; where SSD has no copy it is gone."""
        before = _tiers(run)
        run.in_dram = False
        self.dram_ledger.remove(run)
        self.dram_blocks -= len(run.blocks)
        for block in run.blocks:
            self._dram.displace(block)
        self._moved(run, before)
        self._forget_if_gone(run)

    def enter_ssd(self, run: Run) -> None:
        """A run's copy on SSD can be read; `run.segment` tells so already."""
        self.ssd_ledger.add(run)
        self._moved(run, _DRAM if run.in_dram else 0)

    def enter_ssd_at_start(self, runs: Sequence[Run]) -> None:
        """Many runs that were in no tier are on SSD, as `enter_ssd` says it of one."""
        for run in runs:
            self.ssd_ledger.add(run)
            self.tell(run)
        self._residency.fill(b"".join(block.key for run in runs for block in run.blocks), _SSD)

    def leave_ssd(self, run: Run) -> None:
        """A run's copy on SSD cannot be read any more; `run.segment` is 0 already."""
        self.ssd_ledger.remove(run)
        self._moved(run, _SSD | (_DRAM if run.in_dram else 0))
        self._forget_if_gone(run)

    def drop_block(self, block: Block) -> None:
        """Forget one block in both tiers; a slot that is pinned stays until the last pin."""
        run = block.run
        assert run is not None
        self._residency.move((block.key,), _tiers(run), 0)
        if self.blocks.get(block.key) is block:
            del self.blocks[block.key]
        if run.in_dram:
            self.dram_ledger.shrink(run.tenant, block.image_bytes)
            self.dram_blocks -= 1
        if run.on_ssd:
            self.ssd_ledger.shrink(run.tenant, block.image_bytes)
            assert self.segments is not None
            self.segments.note_shrunk(run, block.image_bytes)
            block.ssd_offset = NOWHERE
        # Of its pins, those of leases count in the run too; a copy in flight pins once more.
        run.pins -= block.pins - (run.state is not State.RESIDENT)
        run.remove(block)
        if block.offset != NOWHERE and not block.pins:
            self._dram.displace(block)
        if not run.blocks:
            self._end(run)
        else:
            self.tell(run)

    def lose_dram_copy(self, block: Block) -> None:
        """A block's bytes in DRAM are wrong; where SSD holds it, it goes on there, as a run of its own."""
        run = block.run
        assert run is not None
        if not run.on_ssd or block.ssd_offset == NOWHERE:
            self.drop_block(block)
            return
        assert self.segments is not None
        twin = Block(block.key, block.payload_bytes, block.checksum)
        twin.ssd_offset = block.ssd_offset
        alone = self.make_run(run.tenant, [twin], saved_unix_s=run.saved_unix_s)
        self.segments.note_found(self.segments.by_number[run.segment], alone)
        self.drop_block(block)
        self.add(alone)
        self.enter_ssd(alone)

    def touch(self, run: Run) -> None:
        """A run was used: it is the nearest of those that nobody waits for, and lives on."""
        self._use(run, self.now_s())
        self.dram_ledger.touch(run)
        self.ssd_ledger.touch(run)
        self.tell(run)

    def touch_chain(self, runs: Sequence[Run]) -> None:
        """Note a use of a chain, given first run first; its end will go before its beginning."""
        for run in reversed(runs):
            self.touch(run)

    def tell(self, run: Run) -> None:
        """Tell the planner's index what a run is like now."""
        self.index.put(
            Item(
                item_id=run.number,
                size_bytes=run.size_bytes,
                in_dram=run.in_dram,
                on_ssd=run.on_ssd,
                state=run.state,
                last_use_s=run.use_s,
                expires_at_s=run.expires_s,
                pinned=run.pins > 0,
                tenant=run.tenant,
            )
        )

    def settle(self, run: Run) -> None:
        """A move ended: tell what the run is like now, or forget one that no tier holds."""
        self._forget_if_gone(run)
        if run.blocks:
            self.tell(run)

    def _use(self, run: Run, now_s: float) -> None:
        run.use_s = now_s
        run.expires_s = now_s + self._ttl_s

    def now_s(self) -> float:
        """The time, and later than any that was told before: so the order of uses is no matter of chance."""
        self._last_use_s = max(self._clock.monotonic_s(), self._last_use_s + _TICK_S)
        return self._last_use_s

    def _moved(self, run: Run, before: int) -> None:
        after = _tiers(run)
        self._residency.move([block.key for block in run.blocks], before, after)
        self.tell(run)

    def _forget_if_gone(self, run: Run) -> None:
        if run.in_dram or run.on_ssd or run.state is not State.RESIDENT:
            return
        for block in list(run.blocks):
            if self.blocks.get(block.key) is block:
                del self.blocks[block.key]
            run.remove(block)
        self._end(run)

    def _end(self, run: Run) -> None:
        if run.in_dram:
            self.dram_ledger.remove(run)
            run.in_dram = False
        if run.on_ssd:
            self.ssd_ledger.remove(run)
            assert self.segments is not None
            self.segments.forget(run)
        if self.runs.pop(run.number, None) is not None and run.number in self.index:
            self.index.forget(run.number)


def _tiers(run: Run) -> int:
    return (_DRAM if run.in_dram else 0) | (_SSD if run.on_ssd else 0)
