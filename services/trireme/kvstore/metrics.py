"""What the store counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trireme.kvcache.tiered_store import TieredStore
from trireme.kvstore.block_streams import TransferCounters
from trireme.kvstore.figures import stats_of
from trireme.wire.kvstore.v1.kvstore_pb2 import GetStatsResponse, TierStats

_TIER_GAUGES = {
    "capacity_bytes": "Bytes the tier may use.",
    "used_bytes": "Bytes in use, headers and padding included.",
    "blocks": "Blocks held.",
    "serving": "1 where the tier serves, 0 where it is off: its disk is gone, failed or does not answer.",
}
_TIER_COUNTERS = {
    "hits": "Blocks that readers found in the tier.",
    "evictions": "Blocks put out to make room.",
    "corrupt": "Blocks whose bytes were not those saved: each became a miss.",
}
_GAUGES = {
    "write_behind_bytes": "Bytes waiting to be written to SSD.",
    "write_behind_blocks": "Blocks waiting to be written to SSD.",
    "leases": "Leases held by readers.",
    "queued_jobs": "Waiting requests that hints tell of and whose blocks are here.",
    "sessions": "Conversations known.",
    "peers": "Stores of other nodes that can be asked.",
}
_COUNTERS = {
    "lookups": "Blocks asked for before loading.",
    "misses": "Blocks that readers asked for and did not find.",
    "late": "Blocks that were on SSD and did not come in time.",
    "committed": "Blocks saved.",
    "promoted": "Blocks read from SSD into DRAM.",
    "write_behind_dropped": "Blocks that left DRAM unwritten: the SSD took nothing or could not keep up.",
    "outlived": "Blocks deleted because nobody used them for the time to live.",
    "fetched_ahead": "Blocks read from SSD because a waiting request will need them.",
    "from_peers": "Blocks fetched from other nodes.",
    "to_peers": "Blocks sent to other nodes.",
    "peer_corrupt": "Blocks from other nodes that did not have their checksum.",
    "expired": "Holds and reservations whose owner was too slow or died.",
}


class KvStoreCollector(Collector):
    """Reads the store at scrape time."""

    def __init__(self, store: TieredStore, transfers: TransferCounters, *, node: str) -> None:
        self._store = store
        self._transfers = transfers
        self._node = node

    def collect(self) -> Iterator[Metric]:
        yield from families_of(stats_of(self._store, self._transfers, node=self._node))


def families_of(stats: GetStatsResponse) -> Iterator[Metric]:
    """What Prometheus gets of a store's figures."""
    yield from _tier_metrics(stats)
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"trireme_kv_{name}", text, value=getattr(stats, name))
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"trireme_kv_{name}", text, value=getattr(stats, name))
    yield CounterMetricFamily(
        "trireme_kv_matched", "Blocks asked for before loading and found.", value=stats.hits
    )


def _tier_metrics(stats: GetStatsResponse) -> Iterator[Metric]:
    tiers: dict[str, TierStats] = {"dram": stats.dram, "ssd": stats.ssd}
    for name, text in _TIER_GAUGES.items():
        gauge = GaugeMetricFamily(f"trireme_kv_{name}", text, labels=["tier"])
        for tier, figures in tiers.items():
            gauge.add_metric([tier], getattr(figures, name))
        yield gauge
    for name, text in _TIER_COUNTERS.items():
        counter = CounterMetricFamily(f"trireme_kv_{name}", text, labels=["tier"])
        for tier, figures in tiers.items():
            counter.add_metric([tier], getattr(figures, name))
        yield counter
