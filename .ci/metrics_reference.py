"""Write the reference part of docs/metrics.md from the collectors; with --check, fail if it is not so.

Run as `make metrics-reference`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from trireme.gateway.metrics import Metrics as GatewayMetrics
from trireme.kvstore.metrics import families_of
from trireme.placement.kubernetes_metrics import KubernetesCollector
from trireme.placement.metrics import PlacementCollector
from trireme.power.metrics import registry_of as power_registry
from trireme.scheduler.metrics import Metrics as SchedulerMetrics
from trireme.wire.kvstore.v1.kvstore_pb2 import GetStatsResponse
from trireme.worker.metrics import EngineCollector
from trireme.worker.vllm_aliases import VllmAliases

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
MARK = "<!-- Below: made by `make metrics-reference`. -->"


def services() -> Iterator[tuple[str, str, list[Metric]]]:
    """(title, one sentence, metric families) of each kind of process."""
    nothing = SimpleNamespace(
        ledger=SimpleNamespace(books={}, duplicate_facts=0, refused_facts=0),
        meters={},
        intensity=SimpleNamespace(source="", grams_co2e_per_kwh=0.0, age_s=0.0),
    )
    nobody = SimpleNamespace(table=SimpleNamespace(living=(), histories={}), actions={})
    yield "gateway", "Each gateway.", of_registry(GatewayMetrics().registry)
    yield "scheduler", "Each replica.", of_registry(SchedulerMetrics().registry)
    yield "worker", "Each worker, per variant.", list(EngineCollector([], lambda: 0.0).collect())
    yield (
        "worker, under vLLM's names",
        "For tools that ask for these (Model Server Protocol); off with `TRIREME_WORKER_VLLM_ALIASES=false`. "
        "`model_name` is the model, `engine` the variant.",
        list(VllmAliases([]).collect()),
    )
    yield "KV store", "Each node's store; `tier` is `dram` or `ssd`.", list(families_of(GetStatsResponse()))
    yield "power", "Each node's power service ([energy.md](energy.md)).", of_registry(power_registry(nothing))
    placement = list(PlacementCollector(SimpleNamespace(targets=tuple), nobody).collect())
    yield "placement", "Where workers are processes of its node.", placement
    mirror = SimpleNamespace(age_s=lambda: 0.0, counts=Counter())
    cluster = SimpleNamespace(
        targets=tuple,
        pods=tuple,
        left={},
        actions={},
        deployments=mirror,
        pod_mirror=mirror,
        lease=SimpleNamespace(held=bool),
    )
    told = {family.name for family in placement}
    yield (
        "placement on Kubernetes",
        "Each replica tells desired and ready workers and its actions, as above, and these.",
        [family for family in KubernetesCollector(cluster).collect() if family.name not in told],
    )


def of_registry(registry: CollectorRegistry) -> list[Metric]:
    """Its families, with the names of their labels."""
    labels = {
        name: collector._labelnames
        for collector, names in registry._collector_to_names.items()
        for name in names
        if hasattr(collector, "_labelnames")
    }
    families = list(registry.collect())
    for family in families:
        family._labelnames = getattr(family, "_labelnames", labels.get(family.name, ()))
    return families


def rows(families: Iterable[Metric]) -> Iterator[str]:
    """One line of the table each."""
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in family._labelnames)
        yield f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


def reference() -> str:
    """The part of the page that follows the mark."""
    parts = []
    for title, sentence, families in services():
        head = "| metric | type | labels | meaning |\n|---|---|---|---|"
        parts.append(
            f"\n## {title[0].upper()}{title[1:]}\n\n{sentence}\n\n{head}\n" + "\n".join(rows(families))
        )
    return "\n".join(parts) + "\n"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    prose = page.partition(MARK)[0]
    wanted = f"{prose}{MARK}\n{reference()}"
    if "--check" in sys.argv:
        if page != wanted:
            print(
                "docs/metrics.md is not what the services serve: run `make metrics-reference`",
                file=sys.stderr,
            )
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
