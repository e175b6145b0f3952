"""Prometheus metrics of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from trireme.worker.variants import LoadedVariant

_COUNTERS: tuple[tuple[str, str, Callable[[LoadedVariant], float]], ...] = (
    ("trireme_engine_steps", "Engine iterations.", lambda v: v.stats.steps),
    (
        "trireme_engine_graph_steps",
        "Of these, those replayed from a captured graph.",
        lambda v: v.stats.graph_steps,
    ),
    ("trireme_engine_busy_seconds", "Seconds spent in iterations.", lambda v: v.stats.busy_s),
    ("trireme_engine_prefill_tokens", "Prompt tokens computed.", lambda v: v.stats.prefill_tokens),
    ("trireme_engine_decode_tokens", "Answer tokens computed.", lambda v: v.stats.decode_tokens),
    (
        "trireme_engine_drafted_tokens",
        "Tokens drafted, and verified beside the others.",
        lambda v: v.stats.drafted_tokens,
    ),
    ("trireme_engine_accepted_tokens", "Those of them that answers took.", lambda v: v.stats.accepted_tokens),
    ("trireme_engine_cached_tokens", "Prompt tokens found in a cache.", lambda v: v.stats.prefix_hit_tokens),
    ("trireme_engine_preloaded_blocks", "KV blocks loaded from the store.", lambda v: v.stats.preload_blocks),
    (
        "trireme_engine_preloads_cut",
        "Loads that met a damaged block: it and what followed were computed.",
        lambda v: v.stats.preload_corrupt,
    ),
    (
        "trireme_engine_preemptions",
        "Times a sequence had to stop before its end: paused, swapped out or evicted.",
        lambda v: v.stats.preemptions,
    ),
    (
        "trireme_engine_recomputed_tokens",
        "Tokens computed again after that, or after a copy failed.",
        lambda v: v.stats.recomputed_tokens,
    ),
    (
        "trireme_engine_evictions",
        "Preemptions that gave the KV up: host memory (`swap_mib`) had no room.",
        lambda v: v.stats.evictions,
    ),
    ("trireme_engine_demotions", "Moves to a lower level of mlfq's queue.", lambda v: v.stats.demotions),
    ("trireme_engine_promotions", "Moves to the highest level.", lambda v: v.stats.promotions),
    (
        "trireme_engine_swapped_out_blocks",
        "KV blocks copied to host memory; what is there already is not copied again.",
        lambda v: v.stats.swapped_out_blocks,
    ),
    (
        "trireme_engine_swapped_in_blocks",
        "KV blocks copied back.",
        lambda v: v.stats.swapped_in_blocks,
    ),
    ("trireme_engine_swap_out_bytes", "Bytes copied to host memory.", lambda v: v.stats.swap_out_bytes),
    ("trireme_engine_swap_in_bytes", "Bytes copied back.", lambda v: v.stats.swap_in_bytes),
    (
        "trireme_engine_swap_out_seconds",
        "Time of those copies, which run beside the iterations.",
        lambda v: v.stats.swap_out_s,
    ),
    ("trireme_engine_swap_in_seconds", "Time of the copies back.", lambda v: v.stats.swap_in_s),
    (
        "trireme_engine_lost_sequences",
        "Sequences whose KV a failed copy lost; they are computed again.",
        lambda v: v.stats.lost_sequences,
    ),
    ("trireme_engine_billed_joules", "Joules billed to requests.", lambda v: v.billed_joules),
)
_GAUGES: tuple[tuple[str, str, Callable[[LoadedVariant], float]], ...] = (
    (
        "trireme_engine_waiting_sequences",
        "Sequences outside the last iteration's batch.",
        lambda v: v.stats.waiting,
    ),
    ("trireme_engine_running_sequences", "Sequences inside it.", lambda v: v.stats.running),
    (
        "trireme_engine_paused_sequences",
        "Of those that wait, those that were stopped and keep their KV on the device.",
        lambda v: v.stats.paused,
    ),
    (
        "trireme_engine_swapped_sequences",
        "Of those that wait, those whose KV is in host memory, or on its way there.",
        lambda v: v.stats.swapped,
    ),
    (
        "trireme_engine_host_blocks",
        "KV blocks that host memory has room for.",
        lambda v: v.stats.host_blocks_total,
    ),
    (
        "trireme_engine_host_blocks_used",
        "Those that swapped sequences hold.",
        lambda v: v.stats.host_blocks_used,
    ),
    (
        "trireme_engine_kv_usage_ratio",
        "Share of KV blocks held by sequences.",
        lambda v: v.stats.kv_blocks_used / v.stats.kv_blocks_total,
    ),
    (
        "trireme_engine_prefill_tokens_per_second",
        "Prompt tokens a second of prefill, measured.",
        lambda v: v.prefill_tokens_per_s,
    ),
    (
        "trireme_engine_decode_tokens_per_second",
        "Answer tokens a second of one sequence, measured.",
        lambda v: v.decode_tokens_per_s,
    ),
)


class EngineCollector:
    """Reads the variants when Prometheus asks, so that a step pays nothing."""

    def __init__(self, variants: Iterable[LoadedVariant], stalled_s: Callable[[], float]) -> None:
        self._variants = variants
        self._stalled_s = stalled_s

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["variant"])
            for variant in self._variants:
                counter.add_metric([variant.plan.variant], read(variant))
            yield counter
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["variant"])
            for variant in self._variants:
                gauge.add_metric([variant.plan.variant], read(variant))
            yield gauge
        age = GaugeMetricFamily("trireme_engine_last_turn_age_seconds", "Age of the engine's last turn.")
        age.add_metric([], self._stalled_s())
        yield age


def registry_of(collector: EngineCollector) -> CollectorRegistry:
    """A registry with this collector alone."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry
