"""What the gateway measures, as `trireme_gateway_*`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The collectors of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trireme_gateway_requests", "Requests that ended.", ["api", "code"], registry=self.registry
        )
        self.inflight = Gauge("trireme_gateway_inflight", "Requests in flight.", registry=self.registry)
        self.links = Gauge(
            "trireme_gateway_worker_links", "Workers with a live stream.", registry=self.registry
        )
        self.first_token = self._seconds("ttft", "From acceptance to the first token.")
        self.inter_token = self._seconds("itl", "Between deliveries, per token.")
        self.end_to_end = self._seconds("e2e", "From acceptance to the last token.")
        self.admission = self._seconds("admission", "To make a request durable.")
        self.refused = Counter(
            "trireme_gateway_refused",
            "Requests refused before they were queued, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.brown_out = Gauge(
            "trireme_gateway_brownout_level",
            "What is given up for this model: 0 nothing, 1 long answers that nobody asked for, "
            "2 the batch class, 3 several choices and log-probabilities.",
            ["model"],
            registry=self.registry,
        )
        self.predicted_wait = Gauge(
            "trireme_gateway_predicted_wait_seconds",
            "Expected wait for the first token, of a tenant that has nothing waiting.",
            ["model", "slo_class"],
            registry=self.registry,
        )
        self.tokens = self._count("tokens", "Answer tokens delivered.")
        self.prompt_tokens = self._count("prompt_tokens", "Prompt tokens admitted.")
        self.truncated_tokens = self._count("truncated_tokens", "Prompt tokens dropped to fit the context.")
        self.pauses = self._count("pauses", "Pauses told to clients.")
        self.resumes = self._count("resumes", "Calls that attached to a request that existed.")
        self.cancelled = self._count("cancelled", "Requests whose client went away or said stop.")
        self.wasted_tokens = self._count("cancelled_tokens", "Answer tokens of cancelled requests.")
        self.requeued = self._count("requeued", "Requests queued again after a worker was lost.")
        self.duplicates = self._count("stale_updates", "Updates dropped: from an older attempt.")
        self.gaps = self._count("gaps", "Updates dropped: tokens before them were missing.")

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"trireme_gateway_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

    def _count(self, name: str, text: str) -> Counter:
        return Counter(f"trireme_gateway_{name}", text, registry=self.registry)
