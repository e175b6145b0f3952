"""The network policies open each edge that the services need, and no other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.install.charts import (
    Object,
    Pod,
    matches,
    of_kind,
    pods,
    render,
    render_values,
    values_files,
    values_of,
)

Edge = tuple[str, str, int]
"""From whom, to whom (services), at which port."""

PROMETHEUS = Pod("prometheus", {}, {})
KEDA = Pod("keda", {}, {})
STRANGER = Pod("stranger", {}, {})
DNS = Pod("dns", {}, {})
NAMESPACES = {"prometheus": "monitoring", "keda": "keda", "stranger": "elsewhere", "dns": "kube-system"}


def name_of(pod: Pod) -> str:
    return pod.owner if pod.owner in NAMESPACES else pod.service


def is_peer(peer: Object, pod: Pod) -> bool:
    """Whether a peer of a policy in the release's namespace names a pod."""
    if "ipBlock" in peer:
        return False
    namespace = NAMESPACES.get(pod.owner, "serving")
    if "namespaceSelector" in peer:
        wanted = peer["namespaceSelector"].get("matchLabels", {})
        if not matches(wanted, {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != "serving":
        return False
    return matches(peer.get("podSelector", {}).get("matchLabels", {}), pod.labels)


def rules_allow(rules: list[Object], side: str, other: Pod, port: int) -> bool:
    for rule in rules or []:
        peers, ports = rule.get(side), rule.get("ports")
        if peers is not None and not any(is_peer(peer, other) for peer in peers):
            continue
        if ports is None or any(p["port"] == port and p["protocol"] == "TCP" for p in ports):
            return True
    return False


def allows(policies: list[Object], direction: str, pod: Pod, other: Pod, port: int) -> bool:
    """The API's rule: pods that a policy selects do only what some policy allows; others do anything.

    Args:
        direction: ingress, into `pod` at `port`; or egress, from `pod` to `port` of the other.
    """
    if pod.owner in NAMESPACES:
        return True
    selecting = [
        policy["spec"]
        for policy in policies
        if direction.title() in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"]["matchLabels"], pod.labels)
    ]
    side = {"ingress": "from", "egress": "to"}[direction]
    return not selecting or any(rules_allow(spec.get(direction), side, other, port) for spec in selecting)


def may_call(policies: list[Object], caller: Pod, called: Pod, port: int) -> bool:
    """Both ends must agree."""
    return allows(policies, "egress", caller, called, port) and allows(
        policies, "ingress", called, caller, port
    )


def edges(objects: list[Object]) -> Iterator[Edge]:
    policies = of_kind(objects, "NetworkPolicy")
    inside = list(pods(objects))
    outside = [PROMETHEUS, KEDA, STRANGER, DNS]
    for caller, called in itertools.product([*inside, *outside], [*inside, DNS]):
        ports = {53} if called is DNS else set(called.ports.values())
        for port in ports:
            ours = caller in inside or called in inside
            if ours and may_call(policies, caller, called, port):
                yield name_of(caller), name_of(called), port


def expected(name: str) -> set[Edge]:
    values: dict[str, Any] = values_of(name)
    services = ["gateway", "scheduler", "worker"]
    store = values.get("kvstore", {}).get("enabled", True)
    if values.get("power", {}).get("enabled", True):
        services.append("power")
    found = {("gateway", "worker", 7030)}
    if values.get("placement", {}).get("enabled"):
        services.append("placement")
        found.add(("placement", "worker", 7030))
    # The test sends its request over gRPC.
    found |= {("test", "gateway", 9000)}
    bundled = values.get("redis", {}).get("mode", "bundled") == "bundled"
    if bundled:
        found |= {(service, "redis", 6379) for service in services}
    if store:
        found.add(("worker", "worker", 7040))
    found |= {(service, "dns", 53) for service in [*services, "test"]}
    if not values.get("networkPolicy", {}).get("clients"):
        found |= {(who, "gateway", port) for who in NAMESPACES for port in (8000, 9000)}
    if values.get("networkPolicy", {}).get("prometheus", True):
        metrics = {"gateway": [8000], "scheduler": [7011], "worker": [7031], "power": [7051]}
        metrics["placement"] = [7061]
        if store:
            metrics["worker"].append(7041)
        found |= {("prometheus", service, port) for service in services for port in metrics[service]}
    keda = any(g.get("autoscaling", {}).get("mode") == "keda" for g in values.get("workers", []))
    if bundled and keda:
        found.add(("keda", "redis", 6379))
    return found


@pytest.mark.parametrize("name", values_files())
def test_what_may_call_whom_is_what_the_services_need(name: str) -> None:
    assert set(edges(render(name))) == expected(name)


@pytest.mark.parametrize("name", values_files())
def test_neither_end_opens_what_the_other_happens_to_close(name: str) -> None:
    objects, wanted = render(name), expected(name)
    policies = of_kind(objects, "NetworkPolicy")
    anyone = not values_of(name).get("networkPolicy", {}).get("clients")
    for caller, called in itertools.product(pods(objects), pods(objects)):
        for port in called.ports.values():
            edge = (caller.service, called.service, port)
            assert allows(policies, "egress", caller, called, port) == (edge in wanted), edge
            # Who may be a client may come from within, too; the caller's own policy says no.
            is_client = called.service == "gateway" and (anyone or caller.service == "test")
            assert allows(policies, "ingress", called, caller, port) == (edge in wanted or is_client), edge


def test_redis_outside_is_reached_on_its_port_and_in_its_range_alone() -> None:
    for policy in of_kind(render("external"), "NetworkPolicy"):
        if policy["metadata"]["name"].endswith("-test"):
            continue
        ranges = [
            (rule["ports"][0]["port"], peer["ipBlock"]["cidr"])
            for rule in policy["spec"]["egress"]
            for peer in rule.get("to", [])
            if "ipBlock" in peer
        ]
        assert ranges == [(6380, "10.1.0.0/16")]


def test_the_power_service_alone_reaches_the_carbon_signal_and_all_reach_the_collector() -> None:
    anywhere = {}
    for policy in of_kind(render("external"), "NetworkPolicy"):
        open_ports = {
            p["port"] for rule in policy["spec"]["egress"] if "to" not in rule for p in rule["ports"]
        }
        anywhere[policy["metadata"]["name"].removeprefix("blue-trireme-")] = open_ports
    traced = {4317}
    assert anywhere == {
        "gateway": traced,
        "scheduler": traced,
        "worker": traced,
        "power": traced | {80, 443},
        "test": set(),
    }


def test_placement_alone_reaches_the_api_server_and_nobody_reaches_placement() -> None:
    server = {"apiServer": {"cidrs": ["10.0.0.1/32"], "ports": [6443]}}
    objects = render_values({"placement": {"enabled": True}, "networkPolicy": server})
    ways = {
        policy["metadata"]["name"]: [(peer["ipBlock"]["cidr"], rule["ports"][0]["port"])]
        for policy in of_kind(objects, "NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    }
    assert ways == {"blue-trireme-placement": [("10.0.0.1/32", 6443)]}
    assert not [edge for edge in edges(objects) if edge[1] == "placement" and edge[2] == 7060]
    (policy,) = [
        p
        for p in of_kind(render("mig-device-plugin"), "NetworkPolicy")
        if "placement" in p["metadata"]["name"]
    ]
    open_ports = [[p["port"] for p in r["ports"]] for r in policy["spec"]["egress"] if "to" not in r]
    assert open_ports == [[443, 6443]]


def test_another_releases_pods_are_strangers() -> None:
    mine, theirs = render("default", "blue"), render("default", "trireme")
    policies = [*of_kind(mine, "NetworkPolicy"), *of_kind(theirs, "NetworkPolicy")]
    for caller, called in itertools.product(pods(mine), pods(theirs)):
        for port in called.ports.values():
            if (called.service, port) in (("gateway", 8000), ("gateway", 9000)):
                continue  # anyone may be a client, but inner services have no client's way out
            assert not may_call(policies, caller, called, port), (caller.owner, called.owner, port)


def test_without_policies_nothing_is_closed() -> None:
    objects = render_values({"networkPolicy": {"enabled": False}})
    assert not of_kind(objects, "NetworkPolicy")
