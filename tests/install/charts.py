"""The chart rendered by the Helm SDK, and a way through the objects that come out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

helm_python = pytest.importorskip("helm_python", reason="there is no wheel of Helm's SDK for this machine")

CHART = REPOSITORY / "helm" / "trireme"
VALUES = Path(__file__).parent / "values"
NAMESPACE = "serving"
RELEASES = ("blue", "trireme")
"""The second is named as the chart is."""

Object = dict[str, Any]


class UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, as the API server's strict decoding does."""


def _mapping(loader: UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    doubled = [key for key in keys if keys.count(key) > 1]
    assert not doubled, f"{node.start_mark}: {doubled} twice"
    return loader.construct_mapping(node, deep=True)


UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def values_files() -> list[str]:
    return sorted(path.stem for path in VALUES.glob("*.yaml"))


def values_of(name: str) -> Object:
    return dict(yaml.safe_load((VALUES / f"{name}.yaml").read_text()))


def render_values(values: Object, release: str = "blue") -> list[Object]:
    """Every object that an installation makes, hooks included.

    Raises:
        helm_python.HelmError: the values do not fit the schema, or the chart refuses them.
    """
    if "keysSecret" not in values.get("gateway", {}):
        values = {**values, "gateway": {"allowAnonymous": True, **values.get("gateway", {})}}
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=release, namespace=NAMESPACE)
    return [
        found
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for found in yaml.load_all(text, Loader=UniqueKeys)
        if found is not None
    ]


@functools.cache
def _rendered(name: str, release: str) -> list[Object]:
    return render_values(values_of(name), release)


def render(name: str, release: str = "blue") -> list[Object]:
    """The objects of a values file; a copy."""
    return copy.deepcopy(_rendered(name, release))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod, or the template of many."""

    owner: str
    """kind/name"""
    labels: dict[str, str]
    spec: Object

    @property
    def service(self) -> str:
        return self.labels["trireme/service"]

    @property
    def containers(self) -> list[Object]:
        """Sidecars too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", [])}


def pods(objects: list[Object]) -> Iterator[Pod]:
    for found in objects:
        name = f"{found['kind']}/{found['metadata']['name']}"
        if found["kind"] == "Pod":
            yield Pod(name, found["metadata"]["labels"], found["spec"])
        elif found["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
            template = found["spec"]["template"]
            yield Pod(name, template["metadata"]["labels"], template["spec"])


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def fleet_file(objects: list[Object]) -> str:
    """What the services read as fleet.yaml."""
    (found,) = [o for o in of_kind(objects, "ConfigMap") if "fleet.yaml" in o["data"]]
    return str(found["data"]["fleet.yaml"])


def environment(container: Object, *, secrets: dict[str, str], fields: dict[str, str]) -> dict[str, str]:
    """What a container's process sees: references resolved, `$(NAME)` of earlier variables replaced.

    Args:
        container: a container.
        secrets: values by `secret/key`.
        fields: values of the downward API by path.
    """
    variables: dict[str, str] = {}
    for entry in container["env"]:
        if "value" in entry:
            text = str(entry["value"])
            for name, value in variables.items():
                text = text.replace(f"$({name})", value)
            assert "$(" not in text, f"{entry['name']}: {text} names a variable that comes later, or none"
        elif "secretKeyRef" in entry["valueFrom"]:
            reference = entry["valueFrom"]["secretKeyRef"]
            text = secrets[f"{reference['name']}/{reference['key']}"]
        else:
            text = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        assert entry["name"] not in variables, f"{entry['name']} twice"
        variables[entry["name"]] = text
    return variables
