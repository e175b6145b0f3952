"""The compose file: valid by its specification, closed to the outside, in step with the services."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.install.compose import compose
from tests.install.service_settings import listening, settings_class
from trireme.errors import InvalidConfiguration
from trireme.kvcache.arena import arena_size_bytes
from trireme.kvcache.residency_index import index_words_for
from trireme.runtime.fleet import load_fleet
from trireme.runtime.settings import load

SERVICES = compose()["services"]
OURS = {
    "gateway": "gateway",
    "scheduler": "scheduler",
    "kvstore": "kvstore",
    "worker": "worker",
    "worker-gpu": "worker",
    "power": "power",
    "power-gpu": "power",
}
"""Container -> the service that it runs."""


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def config(name: str) -> Path:
    """A config's file: inline contents cannot be put into containers whose root directory is read-only."""
    found = compose()["configs"][name]
    assert found.keys() == {"file"}
    return REPOSITORY / str(found["file"])


def test_the_file_is_what_the_specification_allows() -> None:
    text = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    schema = json.loads(text)
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(compose())
    broken = compose()
    broken["services"]["gateway"]["red_only"] = True
    assert list(validator.iter_errors(broken))


def command(container: str) -> str:
    return " ".join(SERVICES[container].get("entrypoint", []) + SERVICES[container].get("command", []))


def settings(container: str) -> Any:
    service = OURS[container]
    exported = re.findall(r'(TRIREME_\w+)="\$HOSTNAME:(\d+)"', command(container))
    environment = {**SERVICES[container]["environment"], **{k: f"{container}:{port}" for k, port in exported}}
    return load(settings_class(service), environment, prefix=f"TRIREME_{service.upper()}_")


@pytest.mark.parametrize("container", OURS)
def test_each_service_takes_its_settings_and_is_the_one_that_is_run(container: str) -> None:
    found = settings(container)
    assert found.redis_url == "redis://redis:6379/0"
    assert re.search(rf"(serve )?\b{OURS[container]}\b$", command(container).strip())


def test_a_misspelt_setting_would_be_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="not a setting"):
        load(settings_class("worker"), {"TRIREME_WORKER_DRAINS": "1"}, prefix="TRIREME_WORKER_")


@pytest.mark.parametrize("container", OURS)
def test_health_is_asked_where_the_service_listens(container: str) -> None:
    check = " ".join(SERVICES[container]["healthcheck"]["test"])
    found = re.search(r"http://(\$HOSTNAME|127\.0\.0\.1):(\d+)/readyz", check)
    assert found is not None, check
    assert int(found[2]) in listening(settings(container))
    loopback = OURS[container] == "gateway"
    assert (found[1] == "127.0.0.1") == loopback, "asked at the address that is listened on"


@pytest.mark.parametrize("container", SERVICES)
def test_containers_are_closed(container: str) -> None:
    found = SERVICES[container]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in found
    assert "/tmp" in found["tmpfs"]
    assert {"interval", "timeout", "retries", "test"} <= found["healthcheck"].keys()
    for port in found.get("ports", []):
        assert port.startswith("127.0.0.1:"), port
    published = container in ("gateway", "prometheus", "grafana")
    assert ("ports" in found) == published
    assert compose()["networks"]["fleet"]["internal"] is True


@pytest.mark.parametrize("container", OURS)
def test_a_container_is_killed_only_after_its_drain(container: str) -> None:
    needed_s = getattr(settings(container), "drain_s", getattr(settings(container), "flush_s", 5.0))
    assert seconds(SERVICES[container]["stop_grace_period"]) >= needed_s + 5


def test_profiles_say_where_is_computed_and_what_is_observed() -> None:
    profiles = {name: tuple(found.get("profiles", [])) for name, found in SERVICES.items()}
    assert profiles == {
        **dict.fromkeys(("redis", "gateway", "scheduler", "kvstore"), ()),
        **dict.fromkeys(("worker", "power"), ("cpu",)),
        **dict.fromkeys(("worker-gpu", "power-gpu"), ("gpu",)),
        **dict.fromkeys(("prometheus", "grafana"), ("observability",)),
    }
    for name in ("worker-gpu", "power-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_workers_share_the_stores_memory_which_holds_the_arena() -> None:
    store = SERVICES["kvstore"]
    assert store["ipc"] == "shareable"
    assert SERVICES["worker"]["ipc"] == SERVICES["worker-gpu"]["ipc"] == "service:kvstore"
    assert str(settings("kvstore").arena_directory) == "/dev/shm"
    assert settings("kvstore").node == settings("worker").node == settings("worker-gpu").node
    sizes = load_fleet(config("fleet")).kvstore
    words = index_words_for(sizes.dram_mib * 2**20, sizes.ssd_mib * 2**20)
    shm_bytes = int(store["shm_size"].removesuffix("m")) * 2**20
    assert shm_bytes >= arena_size_bytes(sizes.dram_mib * 2**20, index_words=words)


@pytest.mark.parametrize("container", OURS)
def test_each_reads_a_fleet_file_that_has_what_it_serves_or_meters(container: str) -> None:
    (mounted,) = SERVICES[container]["configs"]
    fleet = load_fleet(config(mounted["source"]))
    if OURS[container] == "worker":
        (group,) = [group for group in fleet.workers if group.name == settings(container).group]
        power = "power-gpu" if group.device.startswith("cuda") else "power"
        assert SERVICES[power]["profiles"] == SERVICES[container]["profiles"]
        assert (settings(container).meter_node or settings(container).node) == settings(power).node
    if OURS[container] == "power":
        (device,) = {group.device for group in fleet.workers}
        assert device == ("cuda:0" if container == "power-gpu" else "cpu"), "no device is metered twice"


def test_prometheus_asks_at_the_ports_that_serve_metrics() -> None:
    (job,) = yaml.safe_load(config("prometheus").read_text())["scrape_configs"]
    asked = {name: found["port"] for found in job["dns_sd_configs"] for name in found["names"]}
    assert asked.keys() == OURS.keys()
    for container, port in asked.items():
        found = settings(container)
        assert int(found.metrics_listen.rpartition(":")[2]) == port


def test_files_and_volumes_that_are_named_exist() -> None:
    whole = compose()
    for name in whole["configs"]:
        assert config(name).is_file(), name
    mounted = {found["source"] for service in SERVICES.values() for found in service.get("configs", [])}
    assert mounted == whole["configs"].keys()
    used = {
        volume.partition(":")[0]
        for found in whole["services"].values()
        for volume in found.get("volumes", [])
    }
    assert used == whole["volumes"].keys()
