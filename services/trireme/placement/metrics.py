"""What placement counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trireme.placement.desired import DesiredFleet
from trireme.placement.reconciler import Reconciler


class PlacementCollector(Collector):
    """Reads the desired and the living fleet at scrape time."""

    def __init__(self, desired: DesiredFleet, reconciler: Reconciler) -> None:
        self._desired = desired
        self._reconciler = reconciler

    def collect(self) -> Iterator[Metric]:
        table = self._reconciler.table
        desired = GaugeMetricFamily(
            "trireme_placement_desired_workers", "Workers wanted, by group.", labels=["group"]
        )
        ready = GaugeMetricFamily(
            "trireme_placement_ready_workers", "Workers that take requests, by group.", labels=["group"]
        )
        restarts = CounterMetricFamily(
            "trireme_placement_worker_deaths", "Deaths that were not asked for, by group.", labels=["group"]
        )
        for target in self._desired.targets():
            desired.add_metric([target.group], target.replicas)
            living = sum(process.ready for process in table.living if process.group == target.group)
            ready.add_metric([target.group], living)
            deaths = sum(h.restarts for (group, _), h in table.histories.items() if group == target.group)
            restarts.add_metric([target.group], deaths)
        actions = CounterMetricFamily(
            "trireme_placement_actions", "Steps taken towards the desired fleet.", labels=["kind"]
        )
        for kind, count in self._reconciler.actions.items():
            actions.add_metric([kind], count)
        yield from (desired, ready, restarts, actions)
