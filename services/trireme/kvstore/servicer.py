"""The gRPC face of the store: decode, decide, encode."""

from __future__ import annotations

from typing import Any

import grpc

from trireme.errors import InvalidRequest
from trireme.kvcache.dram_tier import Slot
from trireme.kvcache.tiered_store import RESERVATION_S, NewBlock, Refusal, TieredStore
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[Any, Any]

MAX_BLOCKS = 16384
"""Blocks that one call may name; a call holds the event loop for about a microsecond per block."""
_MAX_TENANTS = 100
_REFUSALS = {
    Refusal.PRESENT: pb.RESERVATION_PRESENT,
    Refusal.NO_SPACE: pb.RESERVATION_NO_SPACE,
}


class KvStoreServicer(rpc.KvStoreServicer):
    """One store. An offset or a lease of another arena is one that has ended."""

    def __init__(self, store: TieredStore, *, node: str) -> None:
        self._store = store
        self._node = node
        ref = store.arena.ref
        self._arena = pb.Arena(id=ref.arena_id, path=ref.path, size_bytes=ref.size_bytes)

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        _check_count(len(request.block_hashes) // 16)
        available, in_dram = self._store.match(request.namespace, request.block_hashes)
        return pb.MatchResponse(available=available, in_dram=in_dram)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        _check_count(len(request.blocks))
        blocks = [
            NewBlock(
                block_hash=block.block_hash, payload_bytes=block.payload_bytes, checksum=block.checksum
            )
            for block in request.blocks
        ]
        outcomes = self._store.reserve(request.namespace, request.tenant, blocks)
        return pb.ReserveResponse(
            arena=self._arena,
            blocks=[self._reserved(outcome) for outcome in outcomes],
            expires_in_s=RESERVATION_S,
        )

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        if not self._is_ours(request.arena_id):
            return pb.CommitResponse()
        return pb.CommitResponse(committed=self._store.commit(request.generations))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not self._is_ours(request.arena_id):
            return pb.AbortResponse()
        return pb.AbortResponse(aborted=self._store.abort(request.generations))

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> pb.AcquireResponse:
        _check_count(len(request.block_hashes) // 16)
        if not (request.deadline_s >= 0 and request.lease_s > 0):
            raise InvalidRequest(
                f"deadline_s={request.deadline_s} must be at least 0 and lease_s={request.lease_s} above 0",
                param="lease_s",
            )
        acquired = await self._store.acquire(
            request.namespace, request.block_hashes, deadline_s=request.deadline_s, lease_s=request.lease_s
        )
        return pb.AcquireResponse(
            arena=self._arena,
            blocks=[
                pb.AcquiredBlock(
                    offset=self._store.dram.payload_offset(slot),
                    payload_bytes=slot.header.payload_bytes,
                    checksum=slot.header.checksum,
                    generation=slot.generation,
                )
                for slot in acquired.slots
            ],
            lease_id=acquired.lease_id,
            lease_s=acquired.lease_s,
        )

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        if not self._is_ours(request.arena_id):
            return pb.ReleaseResponse()
        held = self._store.release(request.lease_id, corrupt_generations=request.corrupt_generations)
        return pb.ReleaseResponse(held=held)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        return stats_of(self._store, node=self._node)

    def _is_ours(self, arena_id: bytes) -> bool:
        return arena_id == self._arena.id

    def _reserved(self, outcome: Slot | Refusal) -> pb.ReservedBlock:
        if isinstance(outcome, Refusal):
            return pb.ReservedBlock(outcome=_REFUSALS[outcome])
        return pb.ReservedBlock(
            outcome=pb.RESERVATION_RESERVED,
            offset=self._store.dram.payload_offset(outcome),
            generation=outcome.generation,
        )


def stats_of(store: TieredStore, *, node: str) -> pb.GetStatsResponse:
    """What a store holds now and did since its start."""
    dram, ssd, counters, ref = store.dram, store.ssd, store.counters, store.arena.ref
    return pb.GetStatsResponse(
        node=node,
        arena=pb.Arena(id=ref.arena_id, path=ref.path, size_bytes=ref.size_bytes),
        dram=pb.TierStats(
            capacity_bytes=dram.capacity_bytes,
            used_bytes=dram.used_bytes,
            blocks=len(dram),
            hits=counters.dram_hits,
            evictions=dram.evictions,
            corrupt=counters.dram_corrupt,
            serving=True,
        ),
        ssd=pb.TierStats(
            capacity_bytes=ssd.files.quota_bytes,
            used_bytes=ssd.files.used_bytes,
            blocks=len(ssd.files),
            hits=counters.ssd_hits,
            evictions=ssd.files.evictions,
            corrupt=ssd.files.corrupt,
            serving=ssd.serving,
            status=ssd.status,
        )
        if ssd
        else pb.TierStats(status="there is no ssd tier"),
        lookups=counters.lookups,
        hits=counters.matched,
        misses=counters.misses,
        late=counters.late,
        committed=counters.committed,
        promoted=counters.promoted,
        write_behind_bytes=ssd.queue_bytes if ssd else 0,
        write_behind_blocks=ssd.queue_blocks if ssd else 0,
        write_behind_dropped=ssd.dropped if ssd else 0,
        leases=dram.num_leases,
        expired=dram.expired,
        tenants=[
            pb.TenantStats(tenant=tenant, dram_bytes=held_bytes)
            for tenant, held_bytes in dram.tenant_bytes.most_common(_MAX_TENANTS)
        ],
    )


def _check_count(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InvalidRequest(
            f"a call names {blocks} blocks, more than {MAX_BLOCKS}: ask in parts", param="block_hashes"
        )
