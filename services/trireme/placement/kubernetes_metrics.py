"""What placement counts on a cluster, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from trireme.placement.kubernetes_scaler import KubernetesScaler


class KubernetesCollector(Collector):
    """Reads what is wanted and what was last seen at scrape time."""

    def __init__(self, scaler: KubernetesScaler) -> None:
        self._scaler = scaler

    def collect(self) -> Iterator[Metric]:
        scaler = self._scaler
        desired = GaugeMetricFamily(
            "trireme_placement_desired_workers", "Workers wanted, by group.", labels=["group"]
        )
        ready = GaugeMetricFamily(
            "trireme_placement_ready_workers", "Workers that take requests, by group.", labels=["group"]
        )
        left = GaugeMetricFamily(
            "trireme_placement_groups_left",
            "1 where another number of workers is wanted than someone else set.",
            labels=["group"],
        )
        pods = scaler.pods()
        for target in scaler.targets():
            desired.add_metric([target.group], target.replicas)
            count = sum(pod.group == target.group and pod.ready and not pod.terminating for pod in pods)
            ready.add_metric([target.group], count)
            left.add_metric([target.group], target.group in scaler.left)
        actions = CounterMetricFamily(
            "trireme_placement_actions", "Steps taken towards the desired fleet.", labels=["kind"]
        )
        for kind, count in scaler.actions.items():
            actions.add_metric([kind], count)
        age = GaugeMetricFamily(
            "trireme_placement_api_age_seconds",
            "Since the cluster's API last told or confirmed what is there.",
        )
        age.add_metric([], scaler.deployments.age_s())
        leads = GaugeMetricFamily("trireme_placement_leads", "1 where this replica is the one that scales.")
        leads.add_metric([], scaler.lease.held())
        calls = CounterMetricFamily(
            "trireme_placement_api_calls",
            "Lists and watches of the cluster's objects, and how they failed.",
            labels=["kind"],
        )
        for kind, count in (scaler.deployments.counts + scaler.pod_mirror.counts).items():
            calls.add_metric([kind], count)
        yield from (desired, ready, left, actions, age, leads, calls)
