"""Saving: room for blocks that someone writes, and their publication once they are written.

A block is readable after its commit and never before; what is not committed in time is given back, so a
writer may die at any point.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trireme.errors import InvalidRequest
from trireme.kvcache.block_codec import (
    HASH_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockKey,
    block_key,
    image_bytes,
    namespace_digest,
    tenant_label,
)
from trireme.kvcache.block_table import BlockTable
from trireme.kvcache.dram_tier import DramTier
from trireme.kvcache.evictions import Evictions
from trireme.kvcache.look_ahead import LookAhead
from trireme.kvcache.stored_blocks import MAX_RUN_BYTES, Block, Run, cut_into_runs, runs_of
from trireme.runtime.clock import Clock

RESERVATION_S = 10.0
"""A writer that has not committed by then is taken for dead."""
_ROOM_S = 0.25
"""A writer waits no longer for older blocks to be written to SSD; then they are dropped."""
_RUNS_IN_DRAM = 32
"""A run takes at most this part of DRAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBlock:
    """A block to be saved."""

    block_hash: bytes
    payload_bytes: int


class Refusal(enum.Enum):
    """Why no room was reserved."""

    PRESENT = "present"
    NO_SPACE = "no_space"


class Saves:
    """The writers' side of a store; `leading` gives the blocks of a chain up to the first that is missing."""

    def __init__(
        self,
        table: BlockTable,
        dram: DramTier,
        evictions: Evictions,
        look_ahead: LookAhead,
        *,
        leading: Callable[[Iterable[BlockKey]], list[Block]],
        clock: Clock,
    ) -> None:
        self._table = table
        self._dram = dram
        self._evictions = evictions
        self._look_ahead = look_ahead
        self._leading = leading
        self._clock = clock
        self._most_run_bytes = min(MAX_RUN_BYTES, dram.capacity_bytes // _RUNS_IN_DRAM)
        self.committed_blocks = 0
        """Since the start."""

    async def prepare_room(self, blocks: Sequence[NewBlock]) -> None:
        """Wait a moment for room where blocks come in faster than the disk takes older ones."""
        size_bytes = sum(image_bytes(block.payload_bytes) for block in blocks)
        if size_bytes > self._dram.free_bytes:
            await self._evictions.prepare(size_bytes, deadline_s=_ROOM_S)

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
        present = [found for key in keys for found in self._leading([key])]
        self._table.touch_chain(runs_of(present))
        held = {block.key for block in present}
        outcomes: list[Block | Refusal] = []
        for key, wanted in zip(keys, blocks, strict=True):
            if key in held or self._dram.is_being_written(key):
                outcomes.append(Refusal.PRESENT)
            else:
                block_room = self.reserve_key(key, label, wanted.payload_bytes, expires_s)
                outcomes.append(block_room or Refusal.NO_SPACE)
        self._look_ahead.note_room()
        return outcomes

    def reserve_key(self, key: BlockKey, tenant: str, payload_bytes: int, expires_s: float) -> Block | None:
        """Room for one block that is neither here nor being written; None where there is none."""
        block = Block(key, payload_bytes, 0)
        if not self._evictions.make_share(tenant, block.image_bytes) or not self._evictions.place(block):
            return None
        self._table.dram_ledger.grow(tenant, block.image_bytes)
        self._dram.reserve(block, tenant=tenant, expires_s=expires_s)
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
            reservation = self._dram.end_reservation(generation)
            if reservation is None:
                continue
            block = reservation.block
            block.checksum = checksum
            self._table.dram_ledger.shrink(reservation.tenant, block.image_bytes)
            by_tenant.setdefault(reservation.tenant, []).append(block)
        saved_unix_s = self._clock.unix_s()
        runs: list[Run] = []
        for tenant, blocks in by_tenant.items():
            for part in cut_into_runs(blocks, max_run_bytes=self._most_run_bytes):
                runs.append(self._table.make_run(tenant, part, saved_unix_s=saved_unix_s))
        for run in reversed(runs):
            for position, block in enumerate(run.blocks):
                self._dram.seal(block, position=position)
            self._table.add(run, used_s=self._table.now_s())
            self._table.enter_dram(run)
        committed = sum(len(run.blocks) for run in runs)
        self.committed_blocks += committed
        return committed

    def abort(self, generations: Sequence[int]) -> int:
        """Give reserved room back; returns how many still were reserved."""
        aborted = 0
        for generation in generations:
            reservation = self._dram.end_reservation(generation)
            if reservation is not None:
                self._table.dram_ledger.shrink(reservation.tenant, reservation.block.image_bytes)
                self._dram.displace(reservation.block)
                aborted += 1
        return aborted
