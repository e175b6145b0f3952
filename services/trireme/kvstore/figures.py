"""What a store holds now and did since its start."""

from __future__ import annotations

from trireme.kvcache.tiered_store import TieredStore
from trireme.kvstore.block_streams import TransferCounters
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb

_MAX_TENANTS = 100


def stats_of(store: TieredStore, transfers: TransferCounters, *, node: str) -> pb.GetStatsResponse:
    """The figures of a store, for the RPC and for Prometheus alike."""
    counters, moved, ref = store.counters, store.moved, store.arena.ref
    return pb.GetStatsResponse(
        node=node,
        arena=pb.Arena(id=ref.arena_id, path=ref.path, size_bytes=ref.size_bytes),
        dram=pb.TierStats(
            capacity_bytes=store.dram.capacity_bytes,
            used_bytes=store.dram.used_bytes,
            blocks=store.table.dram_blocks,
            hits=counters.dram_hits,
            evictions=moved.evicted,
            corrupt=moved.dram_corrupt,
            serving=True,
        ),
        ssd=_ssd_stats(store),
        lookups=counters.lookups,
        hits=counters.matched,
        misses=counters.misses,
        late=counters.late,
        committed=store.saves.committed_blocks,
        promoted=moved.promoted,
        write_behind_bytes=store.evictions.writing_bytes,
        write_behind_blocks=store.evictions.writing_blocks,
        write_behind_dropped=moved.unsaved,
        leases=store.dram.num_leases,
        expired=store.dram.expired,
        tenants=_tenants(store),
        outlived=store.look_ahead.outlived_blocks,
        fetched_ahead=moved.fetched_ahead,
        queued_jobs=len(store.look_ahead.jobs),
        sessions=len(store.sessions),
        from_peers=transfers.from_peers,
        to_peers=transfers.to_peers,
        peer_corrupt=transfers.corrupt,
        peers=store.peers,
    )


def _ssd_stats(store: TieredStore) -> pb.TierStats:
    ssd, moved = store.ssd, store.moved
    if ssd is None:
        return pb.TierStats(status="there is no ssd tier")
    return pb.TierStats(
        capacity_bytes=ssd.segments.quota_bytes,
        used_bytes=ssd.segments.used_bytes,
        blocks=ssd.segments.live_blocks,
        hits=store.counters.ssd_hits,
        evictions=ssd.segments.evicted_blocks + moved.ssd_evicted,
        corrupt=moved.ssd_corrupt,
        serving=ssd.serving,
        status=ssd.status,
    )


def _tenants(store: TieredStore) -> list[pb.TenantStats]:
    dram, ssd = store.table.dram_ledger, store.table.ssd_ledger
    largest = (dram.bytes + ssd.bytes).most_common(_MAX_TENANTS)
    return [
        pb.TenantStats(
            tenant=tenant,
            dram_bytes=dram.bytes[tenant],
            ssd_bytes=ssd.bytes[tenant],
            over_quota=dram.over_quota[tenant] + ssd.over_quota[tenant],
        )
        for tenant, _ in largest
    ]
