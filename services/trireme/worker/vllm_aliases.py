"""A worker's figures under the names that vLLM gave them.

Endpoint pickers of the Gateway API Inference Extension, autoscalers and dashboards ask for these. Each value
is one that this worker has anyway; the native names (`trireme_engine_*`) say more.

Source: Model Server Protocol, gateway-api-inference-extension docs/proposals/003; names, labels and buckets
of vLLM's v1 metrics.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from trireme.wire.bus.v1.facts_pb2 import RequestKind
from trireme.wire.inference.v1 import inference_pb2 as inference
from trireme.worker.live_requests import LiveRequest
from trireme.worker.step_news import StepNews
from trireme.worker.variants import LoadedVariant

LABELS = ("model_name", "engine")
"""`engine` is the variant: a worker may serve several of one model."""

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))
_REASONS = {
    inference.FINISH_REASON_STOP: "stop",
    inference.FINISH_REASON_LENGTH: "length",
    inference.FINISH_REASON_CANCELLED: "abort",
    inference.FINISH_REASON_ERROR: "error",
}

_GAUGES: tuple[tuple[str, str, Callable[[LoadedVariant], float]], ...] = (
    ("num_requests_running", "Sequences in the last batch.", lambda v: v.stats.running),
    ("num_requests_waiting", "Sequences that wait.", lambda v: v.stats.waiting),
    ("num_requests_swapped", "Those of them whose KV is in host memory.", lambda v: v.stats.swapped),
    ("kv_cache_usage_perc", "Share of KV blocks held by sequences, 0 to 1.", lambda v: _kv_usage(v)),
    ("gpu_cache_usage_perc", "The same under its older name.", lambda v: _kv_usage(v)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[LoadedVariant], float]], ...] = (
    ("prompt_tokens", "Prompt tokens computed.", lambda v: v.stats.prefill_tokens),
    ("generation_tokens", "Answer tokens computed.", lambda v: v.stats.decode_tokens),
    ("num_preemptions", "Times a sequence had to stop before its end.", lambda v: v.stats.preemptions),
    ("prefix_cache_queries", "Tokens looked for in the cache.", lambda v: v.stats.prefix_query_tokens),
    ("prefix_cache_hits", "Tokens found there.", lambda v: v.stats.prefix_hit_tokens),
    ("spec_decode_num_draft_tokens", "Tokens drafted and verified.", lambda v: v.stats.drafted_tokens),
    ("spec_decode_num_accepted_tokens", "Those of them taken.", lambda v: v.stats.accepted_tokens),
)


def _kv_usage(variant: LoadedVariant) -> float:
    return variant.stats.kv_blocks_used / variant.stats.kv_blocks_total


class Tally:
    """A histogram that takes many equal values at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """So many of this value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus wants them."""
        shown, so_far = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            so_far += count
            shown.append((bound, float(so_far)))
        return shown


_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the assignment's arrival here to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Time of the iteration that made a token, per token.", _BETWEEN_TOKENS),
    "time_per_output_token_seconds": ("The same under its older name.", _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("From the assignment's arrival here to the last token.", _REQUEST),
    "request_queue_time_seconds": ("From the assignment's arrival to the first iteration.", _REQUEST),
    "request_prefill_time_seconds": ("From the first iteration to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST),
    "request_inference_time_seconds": ("From the first iteration to the last token.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens of requests that ended.", _TOKENS),
    "request_generation_tokens": ("Answer tokens of requests that ended.", _TOKENS),
}
_TWINS = {"time_per_output_token_seconds": "inter_token_latency_seconds"}


def _tallies() -> dict[str, Tally]:
    return {name: Tally(bounds) for name, (_, bounds) in _HISTOGRAMS.items() if name not in _TWINS}


@dataclass(slots=True)
class _Seen:
    """What was seen of one variant's requests."""

    tallies: dict[str, Tally] = field(default_factory=_tallies)
    ended: Counter[str] = field(default_factory=Counter)


class VllmAliases:
    """Hears of steps and of requests' ends; tells when Prometheus asks."""

    def __init__(self, variants: Iterable[LoadedVariant]) -> None:
        self._variants = variants
        self._seen: dict[str, _Seen] = {}

    def note_step(self, news: StepNews) -> None:
        """An iteration ended."""
        # A first token is its prefill's.
        rare = [o for o in news.outputs if o.token_id is not None and o.cached_tokens is None]
        made = len(news.tokens) // 3 + len(rare)
        if made:
            tallies = self._seen.setdefault(news.variant, _Seen()).tallies
            tallies["inter_token_latency_seconds"].add(news.seconds, made)

    def note_end(self, live: LiveRequest) -> None:
        """A request's last choice ended."""
        seen = self._seen.setdefault(live.variant, _Seen())
        reasons = [choice.finished.reason for choice in live.choices if choice.finished is not None]
        seen.ended[_REASONS.get(max(reasons), "error") if reasons else "error"] += 1
        request = live.assignment.request
        if request.kind != RequestKind.REQUEST_KIND_GENERATE or not live.first_token_unix_s:
            return
        started, first, ended = live.started_unix_s, live.first_token_unix_s, live.ended_unix_s
        made = sum(len(choice.token_ids) for choice in live.choices)
        for name, value in {
            "time_to_first_token_seconds": first - live.received_unix_s,
            "e2e_request_latency_seconds": ended - live.received_unix_s,
            "request_queue_time_seconds": started - live.received_unix_s,
            "request_prefill_time_seconds": first - started,
            "request_decode_time_seconds": ended - first,
            "request_inference_time_seconds": ended - started,
            "request_prompt_tokens": float(len(request.prompt_token_ids)),
            "request_generation_tokens": float(made),
        }.items():
            seen.tallies[name].add(max(0.0, value))

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for variant in self._variants:
                gauge.add_metric(_labels(variant), read(variant))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for variant in self._variants:
                counter.add_metric(_labels(variant), read(variant))
            yield counter
        yield from self._requests()
        yield from self._infos()

    def _requests(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=(*LABELS, "finished_reason")
        )
        for variant in self._variants:
            seen = self._seen.get(variant.plan.variant, _Seen())
            for reason in _REASONS.values():
                ended.add_metric((*_labels(variant), reason), seen.ended[reason])
        yield ended
        for name, (text, _) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for variant in self._variants:
                tally = self._seen.get(variant.plan.variant, _Seen()).tallies[_TWINS.get(name, name)]
                family.add_metric(_labels(variant), tally.buckets(), tally.total)
            yield family

    def _infos(self) -> Iterator[Metric]:
        sizes = GaugeMetricFamily(
            "vllm:cache_config_info",
            "1; the labels tell the KV cache's size.",
            labels=(*LABELS, "block_size", "num_gpu_blocks"),
        )
        for variant in self._variants:
            shape = (str(variant.block_tokens), str(variant.stats.kv_blocks_total))
            sizes.add_metric((*_labels(variant), *shape), 1.0)
        yield sizes
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Now; there are no adapters, so the labels are empty.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        adapters.add_metric(("0", "", ""), time.time())
        yield adapters


def _labels(variant: LoadedVariant) -> tuple[str, str]:
    return variant.plan.model, variant.plan.variant
