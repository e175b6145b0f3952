"""What the chart tells the services is what they take: settings, fleet file, ports, times, sizes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.install.charts import (
    CHART,
    Object,
    Pod,
    environment,
    fleet_file,
    of_kind,
    pods,
    render,
    render_values,
    values_files,
    values_of,
)
from tests.install.service_settings import listening, settings_class
from trireme.kvcache.arena import arena_size_bytes
from trireme.kvcache.residency_index import index_words_for
from trireme.runtime.fleet import WorkerGroup, load_fleet
from trireme.runtime.settings import load

SERVICES = ("gateway", "scheduler", "worker", "kvstore", "power", "placement")
ELSEWHERE = {
    "placement": {
        *("run_dir", "run_id", "supervise", "worker_command", "surge", "lease_grace_s"),
        *("start_timeout_s", "load_retry_s", "kubeconfig"),
    }
}
"""Settings for where workers are processes of one machine, or where no pod is."""
PLACED: Object = {"placement": {"enabled": True}}
FIELDS = {"status.podIP": "10.1.2.3", "metadata.name": "pod-7", "spec.nodeName": "node-3"}
SECRETS = {"bus/url": "rediss://fleet:secret@redis.example.com:6380/0"}
MIB = 2**20


def service_of(container: Object) -> str | None:
    """The service that a container runs, from its command."""
    module = container["command"][-1]
    return module.removeprefix("trireme.") if module.startswith("trireme.") else None


def loaded(container: Object) -> Any:
    """The container's settings, as the service itself reads them."""
    service = service_of(container)
    assert service is not None
    variables = environment(container, secrets=SECRETS, fields=FIELDS)
    return load(settings_class(service), variables, prefix=f"TRIREME_{service.upper()}_")


def served(objects: list[Object]) -> list[tuple[Pod, Object, Any]]:
    return [
        (pod, container, loaded(container))
        for pod in pods(objects)
        for container in pod.containers
        if service_of(container) is not None
    ]


@pytest.mark.parametrize("name", values_files())
def test_every_service_takes_its_settings(name: str) -> None:
    found = served(render(name))
    expected = {"gateway", "scheduler", "worker", "kvstore", "power"}
    if name == "mig-device-plugin":
        expected = expected - {"kvstore", "power"} | {"placement"}
    assert {service_of(container) for _, container, _ in found} == expected
    (prefix,) = {settings.bus_prefix for _, _, settings in found}
    assert prefix == "serving.blue-trireme"
    (url,) = {settings.redis_url for _, _, settings in found}
    server = "redis://blue-trireme-redis.serving.svc.cluster.local:6379/0"
    bundled = f"{server}?password_file=/etc/trireme-redis/password"
    assert url == (SECRETS["bus/url"] if name == "external" else bundled)


@pytest.mark.parametrize("name", values_files())
def test_the_fleet_file_is_read_as_a_fleet_file(name: str, tmp_path: Path) -> None:
    objects = render(name)
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_file(objects))
    fleet = load_fleet(path)
    groups = {settings.group for _, c, settings in served(objects) if service_of(c) == "worker"}
    assert groups == {group.name for group in fleet.workers}
    assert fleet.slo.interactive.ttft_s == (2 if name == "external" else 10)
    for pod, container, settings in served(objects):
        if service_of(container) in ("gateway", "worker", "kvstore", "power", "placement"):
            assert str(settings.fleet) == "/etc/trireme/fleet.yaml"
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
            (config,) = [c for c in of_kind(objects, "ConfigMap") if "fleet.yaml" in c["data"]]
            assert volumes[mounts["/etc/trireme"]]["configMap"]["name"] == config["metadata"]["name"]


@pytest.mark.parametrize("name", values_files())
def test_checkpoints_are_where_gateways_and_workers_look_for_them(name: str, tmp_path: Path) -> None:
    objects = render(name)
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_file(objects))
    fleet = load_fleet(path)
    for pod in pods(objects):
        if pod.service not in ("gateway", "worker"):
            continue
        (main,) = pod.spec["containers"]
        mounted = [Path(m["mountPath"]) for m in main["volumeMounts"]] + [Path("/opt/trireme/share")]
        for model in fleet.models.values():
            for variant in model.variants.values():
                assert any(variant.checkpoint.is_relative_to(folder) for folder in mounted)


@pytest.mark.parametrize("name", values_files())
def test_ports_are_those_that_are_listened_on(name: str) -> None:
    for pod, container, settings in served(render(name)):
        assert {port["containerPort"] for port in container["ports"]} == listening(settings)
        http = settings.http_listen if hasattr(settings, "http_listen") else settings.metrics_listen
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind not in container:
                continue
            probe = container[kind]["httpGet"]
            assert pod.ports[probe["port"]] == int(http.rpartition(":")[2])
            assert probe["path"] in ("/livez", "/readyz")
    for pod in pods(render(name)):
        numbers = [
            port["containerPort"] for container in pod.containers for port in container.get("ports", [])
        ]
        assert len(set(numbers)) == len(numbers), "the containers of a pod share its ports"


@pytest.mark.parametrize("name", values_files())
def test_probes_tell_start_progress_and_life_apart(name: str) -> None:
    for pod, container, _ in served(render(name)):
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
        if service_of(container) == "kvstore":
            # A worker goes on without its store, so its pod must stay ready.
            assert container["restartPolicy"] == "Always"
            assert "readinessProbe" not in container and "startupProbe" not in container
            continue
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        # Nobody is restarted because others are slow to come: a worker alone is ready by its own doing.
        expected = "/readyz" if pod.service == "worker" else "/livez"
        assert container["startupProbe"]["httpGet"]["path"] == expected


@pytest.mark.parametrize("name", values_files())
def test_those_who_are_called_by_address_register_their_pods_own(name: str) -> None:
    for _, container, settings in served(render(name)):
        if service_of(container) in ("worker", "kvstore", "power", "scheduler", "placement"):
            assert settings.listen.startswith("10.1.2.3:")
            assert settings.metrics_listen.startswith("10.1.2.3:")


@pytest.mark.parametrize("name", values_files())
def test_a_worker_and_its_store_share_a_node_and_are_metered_by_the_machines_power_service(name: str) -> None:
    for pod, container, settings in served(render(name)):
        if service_of(container) in ("worker", "kvstore"):
            assert settings.node == "pod-7"
        if service_of(container) == "worker":
            assert settings.meter_node == "node-3"
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            stores = [c for c in pod.spec.get("initContainers", []) if service_of(c) == "kvstore"]
            for store in stores:
                theirs = {mount["mountPath"]: mount["name"] for mount in store["volumeMounts"]}
                arena = str(loaded(store).arena_directory)
                assert mounts[arena] == theirs[arena], "an arena is one file, at one path for both"
        if service_of(container) == "power":
            assert settings.node == "node-3"
            # With a quota, the CPU's meter would follow the quota's use and not the machine's.
            assert "cpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("name", ["default", "external", "mig-dra"])
def test_shared_memory_holds_the_arena_and_is_paid_for(name: str, tmp_path: Path) -> None:
    objects = render(name)
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_file(objects))
    store = load_fleet(path).kvstore
    words = index_words_for(store.dram_mib * MIB, store.ssd_mib * MIB)
    arena_bytes = arena_size_bytes(store.dram_mib * MIB, index_words=words)
    for pod, container, settings in served(objects):
        if service_of(container) != "kvstore":
            continue
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        arena = volumes[mounts[str(settings.arena_directory)]]["emptyDir"]
        assert arena["medium"] == "Memory"
        assert bytes_of(arena["sizeLimit"]) >= arena_bytes
        assert bytes_of(container["resources"]["limits"]["memory"]) >= arena_bytes + 256 * MIB
        ssd = volumes[mounts[str(settings.directory.parent)]]
        claim = ssd.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec", {})
        room = claim["resources"]["requests"]["storage"] if claim else ssd["emptyDir"]["sizeLimit"]
        assert bytes_of(room) > store.ssd_mib * MIB


def bytes_of(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert found is not None, quantity
    return int(found[1]) * {"Mi": MIB, "Gi": 1024 * MIB}[found[2]]


@pytest.mark.parametrize("name", values_files())
def test_a_pod_is_killed_only_after_its_drain(name: str) -> None:
    for pod, container, settings in served(render(name)):
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        stop = (
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        needed_s = float(stop[1]) + getattr(settings, "drain_s", 5.0)
        for other in pod.containers:
            if service_of(other) == "kvstore":
                needed_s += loaded(other).flush_s
        assert grace_s >= needed_s + 5, (pod.owner, grace_s, needed_s)


def test_a_longer_drain_takes_its_pod_along() -> None:
    values = {"gateway": {"drainSeconds": 300}, "workerDefaults": {"drainSeconds": 400}}
    for pod, container, settings in served(render_values(values)):
        if service_of(container) == "gateway":
            assert settings.drain_s == 300
            assert pod.spec["terminationGracePeriodSeconds"] >= 310
        if service_of(container) == "worker":
            assert settings.drain_s == 400
            assert pod.spec["terminationGracePeriodSeconds"] >= 410


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return found["properties"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_schema_knows_the_settings_that_the_chart_does_not_set_itself(service: str) -> None:
    section = schema()["workerDefaults" if service == "worker" else service]["properties"]
    known = {field.name for field in dataclasses.fields(settings_class(service))}
    container = next(c for _, c, _ in served(render_values(PLACED)) if service_of(c) == service)
    prefix = f"TRIREME_{service.upper()}_"
    names = {entry["name"] for entry in container["env"]}
    ours = {name.removeprefix(prefix).lower() for name in names if name.startswith(prefix)}
    assert set(section["settings"]["properties"]) == known - ours - ELSEWHERE.get(service, set())


def test_a_gateway_is_open_only_where_the_values_say_so() -> None:
    with pytest.raises(Exception, match="keysSecret"):
        render_values({"gateway": {"allowAnonymous": False}})
    for name in values_files():
        for pod, container, settings in served(render(name)):
            if service_of(container) != "gateway":
                continue
            assert settings.allow_anonymous == (settings.keys is None)
            if settings.keys is not None:
                mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
                assert volumes[mounts[str(settings.keys.parent)]]["secret"]["secretName"] == "tenants"
    assert any(values_of(name).get("gateway", {}).get("keysSecret") for name in values_files())


def test_certificates_are_mounted_where_the_services_look_for_them() -> None:
    for pod, container, settings in served(render("external")):
        variables = environment(container, secrets=SECRETS, fields=FIELDS)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        files = {variables[f"TRIREME_TLS_{name}"] for name in ("CERT", "KEY", "CA")}
        assert {Path(file).name for file in files} == {"tls.crt", "tls.key", "ca.crt"}
        own = {"gateway": "inner-gateway", "kvstore": "inner-kvstore"}.get(service_of(container), "inner")
        for file in files:
            assert volumes[mounts[str(Path(file).parent)]]["secret"]["secretName"] == own
        if service_of(container) == "gateway":
            assert volumes[mounts[str(settings.tls_cert.parent)]]["secret"]["secretName"] == "front"
            assert settings.tls_key.parent == settings.tls_cert.parent
            assert {container[probe]["httpGet"]["scheme"] for probe in container if "Probe" in probe} == {
                "HTTPS"
            }
    for _, container, settings in served(render("default")):
        assert not [entry for entry in container["env"] if entry["name"].startswith("TRIREME_TLS_")]
        if service_of(container) == "gateway":
            assert settings.certificates() is None


def test_a_service_without_a_certificate_is_refused_where_others_have_one() -> None:
    with pytest.raises(Exception, match=r"tls\.secrets has no Secret for"):
        render_values({"gateway": {"allowAnonymous": True}, "tls": {"secrets": {"worker": "own"}}})
    with pytest.raises(Exception, match="wrker"):
        render_values({"gateway": {"allowAnonymous": True}, "tls": {"secrets": {"wrker": "own"}}})


def test_the_schema_knows_a_worker_groups_keys() -> None:
    for section in (schema()["workerDefaults"], schema()["workers"]["items"]):
        known = set(section["properties"]["engine"]["properties"])
        assert known == WorkerGroup.model_fields.keys() - {"name", "replicas"}


def test_alerts_and_dashboards_ask_for_metrics_that_are_served() -> None:
    objects = render("external")
    (rule,) = of_kind(objects, "PrometheusRule")
    texts = [r["expr"] for group in rule["spec"]["groups"] for r in group["rules"]]
    (dashboards,) = [c for c in of_kind(objects, "ConfigMap") if "fleet.json" in c["data"]]
    panels = json.loads(dashboards["data"]["fleet.json"])["panels"]
    texts += [target["expr"] for panel in panels for target in panel["targets"]]
    (rule,) = of_kind(
        render_values({**PLACED, "monitoring": {"prometheusRule": {"enabled": True}}}), "PrometheusRule"
    )
    texts += [r["expr"] for group in rule["spec"]["groups"] for r in group["rules"]]
    (scaled,) = of_kind(objects, "ScaledObject")
    texts.append(scaled["spec"]["triggers"][1]["metadata"]["query"])
    asked = {name for text in texts for name in re.findall(r"\btrireme_[a-z0-9_]+", text)}
    assert len(asked) >= 20
    assert asked <= metric_names(), asked - metric_names()


def metric_names() -> set[str]:
    """Names of the samples that the services serve."""
    from trireme.gateway.metrics import Metrics as GatewayMetrics
    from trireme.kvstore import metrics as kvstore
    from trireme.scheduler.metrics import Metrics as SchedulerMetrics
    from trireme.worker.metrics import EngineCollector

    names = set()
    families = [
        *GatewayMetrics().registry.collect(),
        *SchedulerMetrics().registry.collect(),
        *EngineCollector([], lambda: 0.0).collect(),
    ]
    for family in families:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        names |= {family.name + suffix for suffix in suffixes}
    names |= {f"trireme_kv_{name}" for name in (*kvstore._TIER_GAUGES, *kvstore._GAUGES)}
    names |= {f"trireme_kv_{name}_total" for name in (*kvstore._TIER_COUNTERS, *kvstore._COUNTERS)}
    # These need meters or a cluster to tell; their names stand in their sources.
    services = Path(kvstore.__file__).parent.parent
    for source in (services / "power" / "metrics.py", services / "placement" / "kubernetes_metrics.py"):
        for kind, name in re.findall(r'(Counter|Gauge)MetricFamily\(\s*"([a-z_]+)"', source.read_text()):
            names.add(name + ("_total" if kind == "Counter" else ""))
    return names
