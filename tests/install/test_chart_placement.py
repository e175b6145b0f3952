"""Placement as the chart installs it: its Role allows what it needs, on its own release's groups."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import free_port
from tests.install.charts import Object, environment, of_kind, pods, render_values
from tests.service.stand_ins.kubernetes_api import Cluster, api_server
from trireme.placement.kubernetes_api import FIELD_MANAGER, open_kubernetes
from trireme.placement.kubernetes_lease import LeaderLease
from trireme.placement.kubernetes_scaler import KubernetesScaler
from trireme.placement.replica_wishes import ReplicaWishes
from trireme.placement.settings import Settings
from trireme.policies.placement import GroupTarget
from trireme.runtime.clock import SystemClock
from trireme.runtime.settings import load

VALUES: Object = {
    "workers": [
        {"name": "cpu", "replicas": 3},
        {"name": "gpu", "replicas": 0},
        {"name": "auto", "autoscaling": {"mode": "hpa"}},
    ],
    "placement": {"enabled": True, "takeReplicasFrom": ["helm", "argocd-controller"]},
}
FIELDS = {"status.podIP": "10.1.2.3", "metadata.name": "pod-7", "spec.nodeName": "node-3"}


class Wishes:
    """Three of each."""

    async def refresh(self) -> None:
        return None

    def targets(self) -> list[GroupTarget]:
        return [GroupTarget(group=g, replicas=3, variants=()) for g in ("cpu", "gpu", "auto")]


def rules(objects: list[Object]) -> list[Object]:
    (role,) = of_kind(objects, "Role")
    return list(role["rules"])


async def test_its_role_allows_what_it_does_and_it_scales_its_own_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mine, theirs = render_values(VALUES, "blue"), render_values(VALUES, "trireme")
    cluster = Cluster()
    for deployment in of_kind([*mine, *theirs], "Deployment"):
        metadata = deployment["metadata"]
        cluster.install(metadata["name"], metadata["labels"], manager="argocd-controller")
    (pod,) = [pod for pod in pods(mine) if pod.service == "placement"]
    (container,) = pod.containers
    settings = load(Settings, environment(container, secrets={}, fields=FIELDS), prefix="TRIREME_PLACEMENT_")
    assert settings.backend == "kubernetes" and settings.watch_s < settings.stale_s
    clock = SystemClock()
    async with api_server(cluster, free_port(), rules=rules(mine)) as server:
        config = server.kubeconfig(tmp_path / "kubeconfig")
        async with open_kubernetes(config, settings.namespace, clock) as api:
            scaler = KubernetesScaler(
                api,
                cast(ReplicaWishes, Wishes()),
                LeaderLease(api, settings.lease, "one", duration_s=15, clock=clock),
                clock,
                release_selector=settings.release_selector,
                yielding=frozenset((*settings.take_replicas_from, FIELD_MANAGER)),
                period_s=0.05,
                watch_s=2,
                stale_s=30.0,
            )
            running = asyncio.create_task(scaler.run())
            try:
                async with asyncio.timeout(60):
                    while len(scaler.pods()) < 7:
                        assert not running.done(), running.result()
                        await asyncio.sleep(0.02)
                await scaler.lease.release()
            finally:
                while not running.done():
                    running.cancel()
                    await asyncio.wait([running], timeout=0.5)
    assert not server.refused
    counted = {
        name.removeprefix("blue-trireme-worker-"): cluster.replicas(name)
        for kind, name in cluster.objects
        if kind == "deployments" and "blue-trireme-worker" in name
    }
    assert counted == {"cpu": 3, "gpu": 3, "auto": 1}
    assert cluster.replicas("trireme-worker-cpu") == 1


def test_its_role_is_of_its_namespace_and_writes_numbers_and_one_lease() -> None:
    objects = render_values(VALUES)
    (binding,) = of_kind(objects, "RoleBinding")
    (pod,) = [pod for pod in pods(objects) if pod.service == "placement"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": pod.spec["serviceAccountName"], "namespace": "serving"}
    ]
    others = {p.spec["serviceAccountName"] for p in pods(objects) if p.service != "placement"}
    assert pod.spec["serviceAccountName"] not in others
    writes = [
        (verb, resource, name)
        for rule in rules(objects)
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", ["*"])
        if verb not in ("get", "list", "watch")
    ]
    assert sorted(writes) == [
        ("create", "leases", "*"),
        ("patch", "deployments/scale", "blue-trireme-worker-cpu"),
        ("patch", "deployments/scale", "blue-trireme-worker-gpu"),
        ("patch", "leases", "blue-trireme-placement"),
    ]


def test_where_autoscalers_scale_all_groups_it_may_scale_none() -> None:
    values = {
        "placement": {"enabled": True},
        "workers": [{"name": "cpu", "autoscaling": {"mode": "hpa"}}],
    }
    assert "deployments/scale" not in [r for rule in rules(render_values(values)) for r in rule["resources"]]


def test_roles_and_accounts_may_be_made_by_others() -> None:
    own = {"create": False, "name": "scaler"}
    values = {"placement": {"enabled": True, "serviceAccount": own, "rbac": {"create": False}}}
    objects = render_values(values)
    assert not of_kind(objects, "Role", "RoleBinding")
    assert [o["metadata"]["name"] for o in of_kind(objects, "ServiceAccount")] == ["blue-trireme"]
    (pod,) = [pod for pod in pods(objects) if pod.service == "placement"]
    assert pod.spec["serviceAccountName"] == "scaler"


def test_another_number_of_workers_rolls_no_pod_but_placements() -> None:
    def checksums(replicas: int) -> dict[str, str]:
        objects = render_values(
            {"placement": {"enabled": True}, "workers": [{"name": "cpu", "replicas": replicas}]}
        )
        return {
            found["metadata"]["name"]: found["spec"]["template"]["metadata"]["annotations"]["checksum/fleet"]
            for found in of_kind(objects, "Deployment", "DaemonSet")
        }

    before, after = checksums(1), checksums(2)
    assert [name for name in before if before[name] != after[name]] == ["blue-trireme-placement"]
