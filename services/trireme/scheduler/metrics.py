"""Prometheus metrics of the scheduler."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One set per process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._decisions = Counter(
            "trireme_scheduler_decisions_total",
            "Decisions, by outcome: assigned, or stale (cancelled or overtaken).",
            ["outcome"],
            registry=self.registry,
        )
        self._waited = Histogram(
            "trireme_scheduler_wait_seconds",
            "From admission to assignment.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=self.registry,
        )
        self.waiting = Gauge(
            "trireme_scheduler_waiting_requests", "Requests held by this replica.", registry=self.registry
        )
        self.oldest = Gauge(
            "trireme_scheduler_oldest_seconds", "Age of the oldest held request.", registry=self.registry
        )
        self.workers_lost = Counter(
            "trireme_scheduler_workers_lost_total",
            "Workers found dead by this replica.",
            registry=self.registry,
        )

    def decided(self, *, assigned: bool, waited_s: float) -> None:
        self._decisions.labels("assigned" if assigned else "stale").inc()
        if assigned:
            self._waited.observe(max(0.0, waited_s))
