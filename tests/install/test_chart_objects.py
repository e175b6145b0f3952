"""What the chart makes is valid, belongs to its release alone, and asks for no more rights than it needs."""

from __future__ import annotations

import base64
import itertools
import json
import re

import jsonschema
import kubernetes_validate
import pytest

from tests.install.charts import (
    CHART,
    RELEASES,
    Object,
    helm_python,
    matches,
    of_kind,
    pods,
    render,
    render_values,
    values_files,
    values_of,
)
from tests.install.crd_schemas import CRD_SCHEMAS

OLDEST = "1.29"
SINCE = {"ResourceClaimTemplate": "1.34"}
"""Kinds that are used only where a values file asks for them."""
FIELDS_SINCE = {"mig-dra": "1.34"}
"""Values files with newer fields: resource claims, image volumes."""


def check(found: Object, version: str) -> None:
    """Raise unless every field is known to that version of Kubernetes and has the right type."""
    crd = f"{found['apiVersion']}/{found['kind']}"
    if crd in CRD_SCHEMAS:
        jsonschema.validate(found, CRD_SCHEMAS[crd])
    else:
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("name", values_files())
def test_every_object_is_valid_from_the_oldest_kubernetes_to_the_newest(name: str) -> None:
    newest = kubernetes_validate.latest_version()
    for found in render(name):
        check(found, newest)
        check(found, SINCE.get(found["kind"], FIELDS_SINCE.get(name, OLDEST)))


def test_the_check_itself_refuses_what_is_unknown() -> None:
    (gateway, *_) = of_kind(render("default"), "Deployment")
    gateway["spec"]["template"]["spec"]["containers"][0]["readOnlyRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRoot"):
        check(gateway, OLDEST)
    (scaled, *_) = of_kind(render("external"), "ScaledObject")
    scaled["spec"]["triggers"][0]["metadata"]["pendingEntriesCount"] = 8
    with pytest.raises(jsonschema.ValidationError):
        check(scaled, OLDEST)


def test_the_chart_lints() -> None:
    for name in values_files():
        report = helm_python.lint(CHART, values_of(name), strict=True, namespace="serving")
        assert not report["errors"], report
        assert all(message["severity"] < 2 for message in report["messages"]), report


def identities(objects: list[Object]) -> list[tuple[str, str]]:
    return [(found["kind"], found["metadata"]["name"]) for found in objects]


LONG = "a-release-whose-name-is-as-long-as-helm-lets-it-be-0"
PAIRS = [
    RELEASES,
    (LONG + "1", LONG + "2"),
    ("blue", "blue-trireme"),
    ("blue", "blue-trireme-gateway"),
    ("trireme", "trireme-trireme"),
]


@pytest.mark.parametrize("name", values_files())
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_two_releases_in_one_namespace_never_meet(name: str, pair: tuple[str, str]) -> None:
    both = [render(name, release) for release in pair]
    names = [identity for objects in both for identity in identities(objects)]
    assert len(set(names)) == len(names), sorted(names)
    for mine, others in (both, reversed(both)):
        for selector in selectors(mine):
            strangers = [pod.owner for pod in pods(others) if matches(selector, pod.labels)]
            assert not strangers, (selector, strangers)


@pytest.mark.parametrize("release", [*RELEASES, LONG + "1"])
@pytest.mark.parametrize("name", values_files())
def test_names_and_labels_have_the_length_and_the_letters_that_dns_allows(name: str, release: str) -> None:
    for found in render(name, release):
        metadata = found["metadata"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", metadata["name"]), metadata["name"]
        for label in metadata["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", label), label
        standard = {"name", "instance", "component", "version", "part-of", "managed-by"}
        assert {f"app.kubernetes.io/{key}" for key in standard} <= metadata["labels"].keys()


def selectors(objects: list[Object]) -> list[dict[str, str]]:
    """Every set of labels by which an object finds pods of its release."""
    found = []
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "PodDisruptionBudget"):
            found.append(spec["selector"]["matchLabels"])
        elif item["kind"] == "Service":
            found.append(spec["selector"])
        elif item["kind"] == "NetworkPolicy":
            found.append(spec["podSelector"]["matchLabels"])
    return found


@pytest.mark.parametrize("name", values_files())
def test_selectors_find_the_pods_they_are_for(name: str) -> None:
    objects = render(name)
    for selector in selectors(objects):
        assert any(matches(selector, pod.labels) for pod in pods(objects)), selector
    for first, second in itertools.permutations(
        of_kind(objects, "Deployment", "StatefulSet", "DaemonSet"), 2
    ):
        labels = second["spec"]["template"]["metadata"]["labels"]
        assert not matches(first["spec"]["selector"]["matchLabels"], labels), "two owners of one pod"
    for workload in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet"):
        keys = workload["spec"]["selector"]["matchLabels"].keys()
        # A selector cannot be changed: what an upgrade changes must not be in it.
        assert keys == {f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")}


@pytest.mark.parametrize("name", values_files())
def test_services_lead_to_ports_that_their_pods_have(name: str) -> None:
    objects = render(name)
    for service in of_kind(objects, "Service"):
        selected = [pod for pod in pods(objects) if matches(service["spec"]["selector"], pod.labels)]
        for port, pod in itertools.product(service["spec"]["ports"], selected):
            assert port["targetPort"] in pod.ports, (service["metadata"]["name"], port, pod.owner)


@pytest.mark.parametrize("name", values_files())
def test_no_container_has_rights_that_it_does_not_need(name: str) -> None:
    for pod in pods(render(name)):
        # Placement alone calls the cluster's API.
        assert pod.spec["automountServiceAccountToken"] is (pod.service == "placement")
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for place in (pod.spec["securityContext"], *(c["securityContext"] for c in pod.containers)):
            assert not {"runAsUser", "runAsGroup"} & place.keys(), "OpenShift assigns UIDs of its own"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for container in pod.containers:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", values_files())
def test_every_container_says_what_it_needs_and_has_a_place_to_write(name: str) -> None:
    objects = render(name)
    claimed = {
        f"StatefulSet/{found['metadata']['name']}": [
            claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", [])
        ]
        for found in of_kind(objects, "StatefulSet")
    }
    for pod in pods(objects):
        volumes = [volume["name"] for volume in pod.spec["volumes"]] + claimed.get(pod.owner, [])
        assert len(set(volumes)) == len(volumes)
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), container["name"]
            assert "memory" in resources["limits"], container["name"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= set(volumes)
            assert "/tmp" in mounts


@pytest.mark.parametrize("name", values_files())
def test_the_chart_makes_no_role_but_placements_and_no_secret_but_the_bundled_redis(name: str) -> None:
    kinds = {found["kind"] for found in render(name)}
    expected = {"Role", "RoleBinding"} if name == "mig-device-plugin" else set()
    expected |= set() if name == "external" else {"Secret"}
    assert {kind for kind in kinds if "Role" in kind or kind in ("Secret", "Namespace")} == expected


def test_the_bundled_redis_has_a_password_that_all_who_call_it_read() -> None:
    def secrets_of(objects: list[Object]) -> dict[str, set[str]]:
        return {
            pod.service: {
                volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume
            }
            for pod in pods(objects)
            if pod.service != "test"
        }

    made = render_values({})
    (secret,) = of_kind(made, "Secret")
    password = base64.b64decode(secret["data"]["password"])
    assert re.fullmatch(rb"[A-Za-z0-9]{32}", password)
    (other,) = of_kind(render_values({}), "Secret")
    assert other["data"] != secret["data"], "one of its own for each installation"
    assert set(map(tuple, secrets_of(made).values())) == {("blue-trireme-redis",)}
    assert password.decode() not in json.dumps([found for found in made if found is not secret])

    own = render_values({"redis": {"bundled": {"existingSecret": "mine"}}})
    assert not of_kind(own, "Secret")
    assert set(map(tuple, secrets_of(own).values())) == {("mine",)}
    (scaler,) = of_kind(render("mig-dra"), "TriggerAuthentication")
    assert scaler["spec"]["secretTargetRef"] == [
        {"parameter": "password", "name": "blue-trireme-redis", "key": "password"}
    ]


def test_gpus_are_asked_for_in_the_clusters_own_way() -> None:
    workers = [pod for pod in pods(render("mig-device-plugin")) if pod.service == "worker"]
    plugin_10, plugin_20 = (pod.spec["containers"][0]["resources"] for pod in workers)
    assert plugin_10["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert plugin_20["limits"]["nvidia.com/mig-2g.20gb"] == 1
    objects = render("mig-dra")
    (template,) = of_kind(objects, "ResourceClaimTemplate")
    (worker,) = [pod for pod in pods(objects) if pod.service == "worker"]
    assert worker.spec["resourceClaims"] == [
        {"name": "gpu", "resourceClaimTemplateName": template["metadata"]["name"]}
    ]
    assert worker.spec["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]
    assert not [key for key in worker.spec["containers"][0]["resources"]["limits"] if "/" in key]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["deviceClassName"] == "mig.nvidia.com"


@pytest.mark.parametrize("name", values_files())
def test_who_is_scaled_automatically_has_no_fixed_number(name: str) -> None:
    objects = render(name)
    scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    targets = [scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers]
    assert len(set(targets)) == len(targets), "two scalers of one Deployment fight"
    deployments = {found["metadata"]["name"]: found["spec"] for found in of_kind(objects, "Deployment")}
    assert set(targets) <= deployments.keys()
    placed = {
        found["metadata"]["name"]
        for found in of_kind(objects, "Deployment")
        if found["metadata"]["labels"].get("trireme/scaled-by") == "placement"
    }
    assert not placed & set(targets), "two scalers of one Deployment fight"
    assert bool(placed) == (name == "mig-device-plugin")
    for deployment, spec in deployments.items():
        assert ("replicas" in spec) != (deployment in placed | set(targets)), deployment


def test_keda_reads_the_stream_and_the_group_that_schedulers_read() -> None:
    from trireme.bus.connection import Keys
    from trireme.bus.request_records import SCHEDULERS

    objects = render("mig-dra")
    (scaled,) = of_kind(objects, "ScaledObject")
    backlog, inflight = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    prefixes = {
        entry["value"]
        for pod in pods(objects)
        for container in pod.containers
        for entry in container.get("env", [])
        if entry["name"].endswith("_BUS_PREFIX")
    }
    (prefix,) = prefixes
    assert backlog["stream"] == Keys(prefix).requests
    assert backlog["consumerGroup"] == SCHEDULERS
    # A backlog alone would remove workers that are busy with the last of it.
    assert "running_sequences" in inflight["query"]
    (redis,) = [
        found for found in of_kind(objects, "Service") if found["metadata"]["name"].endswith("-redis")
    ]
    assert backlog["address"] == f"{redis['metadata']['name']}.serving.svc.cluster.local:6379"


def test_each_group_is_scaled_by_its_own_pods_series() -> None:
    scaling = {"mode": "keda", "keda": {"prometheusAddress": "http://prometheus:9090"}}
    groups = ("gpu", "gpu-big")
    values = {
        "workers": [{"name": name, "autoscaling": scaling} for name in groups],
        "monitoring": {"serviceMonitor": {"enabled": True}},
    }
    objects = render_values(values)
    (monitor,) = of_kind(objects, "ServiceMonitor")
    kept = monitor["spec"]["podTargetLabels"]
    for scaled in of_kind(objects, "ScaledObject"):
        query = scaled["spec"]["triggers"][1]["metadata"]["query"]
        both = set(re.findall(r"trireme_engine_(?:running|waiting)_sequences{([^}]+)}", query))
        (matched,) = both
        labels = dict(re.findall(r'(\w+)="([^"]+)"', matched))
        assert labels.pop("namespace") == "serving"
        chosen = [
            pod.owner.removeprefix("Deployment/")
            for pod in pods(objects)
            if labels == {re.sub(r"\W", "_", name): pod.labels[name] for name in kept}
        ]
        assert chosen == [scaled["spec"]["scaleTargetRef"]["name"]]


REFUSED = [
    ({"gatway": {}}, "gatway"),
    ({"workers": [{"name": "Upper"}]}, "name"),
    ({"workers": [{"name": "cpu", "engine": {"kv_mb": 1}}]}, "kv_mb"),
    ({"workers": [{"name": "cpu", "settings": {"stal_s": 1}}]}, "stal_s"),
    ({"redis": {"mode": "external"}}, "existingSecret"),
    ({"securityContext": {"readOnlyRootFilesystem": False}}, "readOnlyRootFilesystem"),
    ({"workers": [{"name": "cpu", "autoscaling": {"mode": "keda"}}]}, "prometheusAddress"),
    ({"checkpoints": {"source": "claim"}}, "claimName"),
    ({"workers": [{"name": "a", "gpu": {"mode": "mig"}}]}, "mode"),
    ({"placement": {"settings": {"run_dir": "/x"}}}, "run_dir"),
    ({"placement": {"enabled": True, "serviceAccount": {"create": False}}}, "serviceAccount.name"),
]


@pytest.mark.parametrize(("values", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_wrong_values_are_refused_with_the_key_that_is_wrong(values: Object, key: str) -> None:
    with pytest.raises(helm_python.HelmError, match=key):
        render_values(json.loads(json.dumps(values)))


def test_zero_and_false_override_a_groups_defaults() -> None:
    values = {"workers": [{"name": "idle", "replicas": 0, "podDisruptionBudget": {"enabled": False}}]}
    objects = render_values(values)
    (worker,) = [d for d in of_kind(objects, "Deployment") if d["metadata"]["name"].endswith("worker-idle")]
    assert worker["spec"]["replicas"] == 0
    assert not [b for b in of_kind(objects, "PodDisruptionBudget") if "worker" in b["metadata"]["name"]]
