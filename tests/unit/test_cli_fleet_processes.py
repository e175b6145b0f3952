"""What `trireme up` runs: each service accepts the settings it is given, and the files say so."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path

import pytest

from trireme.cli.fleet_processes import (
    ProcessSpec,
    check_checkpoints,
    check_ports,
    local_address,
    plan_processes,
)
from trireme.cli.redis_server import RedisServer, free_port, prepare
from trireme.cli.run_directory import AlreadyRunning, FleetState, Phase, RunDirectory, SupervisedProcess
from trireme.cli.up import DEFAULT_FLEET, chosen_fleet
from trireme.errors import InvalidConfiguration
from trireme.placement.processes_backend import worker_environ
from trireme.placement.settings import Settings as PlacementSettings
from trireme.runtime.fleet import Fleet, load_fleet
from trireme.runtime.settings import dump, load

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.yaml"))


def specs_of(fleet: Fleet, path: Path, run_directory: RunDirectory) -> list[ProcessSpec]:
    server = RedisServer(["redis-server"], "redis://:secret@127.0.0.1:20001/0", 20001)
    return plan_processes(fleet, path, run_directory, run_id="r1", redis=server).specs


def test_every_service_accepts_the_environment_it_is_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIREME_GATEWAY_LOG_LEVEL", "debug")
    fleet = load_fleet(DEFAULT_FLEET)
    services = set()
    for spec in specs_of(fleet, DEFAULT_FLEET, RunDirectory(tmp_path)):
        if spec.service == "redis":
            continue
        settings_class = importlib.import_module(f"trireme.{spec.service}.settings").Settings
        settings = load(settings_class, spec.environ, prefix=f"TRIREME_{spec.service.upper()}_")
        assert settings.redis_url == "redis://:secret@127.0.0.1:20001/0"
        assert settings.bus_prefix == fleet.name
        assert settings.node == fleet.node
        if spec.service == "gateway":
            assert settings.http_listen == fleet.gateway.http
            assert settings.max_waiting == fleet.gateway.max_queue_requests
            assert settings.log_level == "debug"
        else:
            assert settings.listen == settings.metrics_listen == "127.0.0.1:0"
        services.add(spec.service)
    assert services == {"gateway", "scheduler", "placement", "kvstore", "power"}


def test_a_worker_accepts_the_environment_that_placement_gives_it(tmp_path: Path) -> None:
    worker_settings = importlib.import_module("trireme.worker.settings").Settings
    placement = PlacementSettings(redis_url="redis://bus", fleet=DEFAULT_FLEET, node="n1", run_dir=tmp_path)
    environ = worker_environ(placement, {}) | {"TRIREME_WORKER_GROUP": "large", "TRIREME_WORKER_INDEX": "3"}
    settings = load(worker_settings, environ, prefix="TRIREME_WORKER_")
    assert (settings.group, settings.index, settings.node) == ("large", 3, "n1")
    assert settings.fleet == DEFAULT_FLEET


def test_placement_settings_survive_the_environment(tmp_path: Path) -> None:
    settings = PlacementSettings(
        redis_url="redis://bus",
        fleet=tmp_path / "fleet.yaml",
        run_dir=tmp_path,
        supervise=False,
        worker_command="sh -c 'exec sleep 1'",
        surge=3,
        lease_grace_s=1.5,
    )
    assert load(PlacementSettings, dump(settings, prefix="P_"), prefix="P_") == settings
    assert settings.worker_words == ["sh", "-c", "exec sleep 1"]


def test_gateway_replicas_take_consecutive_ports_and_stop_first(tmp_path: Path) -> None:
    fleet = load_fleet(DEFAULT_FLEET)
    two = fleet.model_copy(update={"gateway": fleet.gateway.model_copy(update={"replicas": 2})})
    specs = specs_of(two, DEFAULT_FLEET, RunDirectory(tmp_path))
    gateways = [spec for spec in specs if spec.service == "gateway"]
    assert [spec.grpc_address for spec in gateways] == ["127.0.0.1:9000", "127.0.0.1:9001"]
    order = [spec.service for spec in sorted(specs, key=lambda spec: spec.stop_rank)]
    assert order[:2] == ["gateway", "gateway"] and order[-1] == "redis"
    assert order.index("placement") < order.index("kvstore")


def test_no_kvstore_is_run_where_it_is_off(tmp_path: Path) -> None:
    fleet = load_fleet(DEFAULT_FLEET)
    off = fleet.model_copy(update={"kvstore": fleet.kvstore.model_copy(update={"enabled": False})})
    assert "kvstore" not in {spec.service for spec in specs_of(off, DEFAULT_FLEET, RunDirectory(tmp_path))}


def test_a_server_that_listens_everywhere_is_called_on_loopback() -> None:
    assert local_address("0.0.0.0:9000") == "127.0.0.1:9000"
    assert local_address("[::]:9000") == "127.0.0.1:9000"
    assert local_address("10.1.2.3:9000") == "10.1.2.3:9000"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_example_is_a_valid_fleet_file(path: Path) -> None:
    assert load_fleet(path).models


def test_the_documented_example_names_every_key() -> None:
    """A key that is added to the fleet file must be explained in the example."""
    text = next(path for path in EXAMPLES if path.name == "fleet.yaml").read_text(encoding="utf-8")
    sections = [Fleet, *(f.annotation for f in Fleet.model_fields.values())]
    names = {
        name for section in sections for name in getattr(section, "model_fields", {}) if section is not None
    }
    assert {name for name in names if f"{name}:" not in text} == set()


def test_a_missing_checkpoint_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("models: {m: {variants: {v: {checkpoint: gone}}}}", encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=r"models\.m\.variants\.v\.checkpoint: .*/gone holds no"):
        check_checkpoints(load_fleet(path), path)


def test_a_null_device_needs_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        'models: {m: {variants: {v: {checkpoint: gone}}}}\nworkers: [{device: "null"}]', encoding="utf-8"
    )
    check_checkpoints(load_fleet(path), path)


def with_gateway(**keys: object) -> Fleet:
    fleet = load_fleet(DEFAULT_FLEET)
    return fleet.model_copy(update={"gateway": fleet.gateway.model_copy(update=keys)})


def test_ports_are_checked_for_every_replica() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fleet = with_gateway(replicas=2, http=f"127.0.0.1:{port - 1}", grpc=f"127.0.0.1:{free_port()}")
        with pytest.raises(InvalidConfiguration) as refused:
            check_ports(fleet, Path("fleet.yaml"))
    assert refused.value.param == "gateway.http"
    assert f":{port} " in refused.value.message or f":{port - 1} " in refused.value.message


@pytest.mark.parametrize("address", ["8000", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65535"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"gateway\.grpc"):
        check_ports(with_gateway(http=f"127.0.0.1:{free_port()}", grpc=address), Path("fleet.yaml"))


def test_overlapping_port_ranges_are_refused() -> None:
    port = free_port()
    fleet = with_gateway(replicas=3, http=f"127.0.0.1:{port}", grpc=f"127.0.0.1:{port + 2}")
    with pytest.raises(InvalidConfiguration, match="overlap"):
        check_ports(fleet, Path("fleet.yaml"))


def test_the_bus_password_is_for_this_user_only(tmp_path: Path) -> None:
    server = prepare(tmp_path / "redis", durability="always")
    configuration = Path(server.command[1])
    assert configuration.stat().st_mode & 0o077 == 0
    text = configuration.read_text()
    assert "appendfsync always" in text and "bind 127.0.0.1" in text
    password = server.url.split(":")[2].split("@")[0]
    assert f"requirepass {password}" in text and len(password) >= 32
    assert prepare(tmp_path / "redis", durability="always").url != server.url


def state(**changes: object) -> FleetState:
    values: dict[str, object] = {
        "phase": "ready",
        "run_id": "r",
        "fleet": "f",
        "node": "n",
        "bus_prefix": "p",
        "redis_url": "redis://x",
        "processes": [SupervisedProcess("gateway-0", "gateway", 12, 3.5, 1, "killed by SIGKILL")],
        "timeline": [Phase("redis", 0.1)],
    }
    return FleetState(**values | changes)  # type: ignore[arg-type]


def test_the_state_file_reads_back_as_written_and_is_private(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    assert directory.read() is None
    directory.write(state())
    assert directory.read() == state()
    assert directory.state_file.stat().st_mode & 0o077 == 0
    assert directory.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"processes": 3, "timeline": []}', "\x00"])
def test_a_damaged_state_file_is_named_not_believed(tmp_path: Path, text: str) -> None:
    directory = RunDirectory(tmp_path)
    directory.state_file.write_text(text)
    with pytest.raises(InvalidConfiguration, match=r"fleet\.json is not a fleet's state file"):
        directory.read()


def test_a_recorded_process_that_ended_is_not_taken_for_a_living_one(tmp_path: Path) -> None:
    """A pid may be reused: init lives, but it did not start when the record says."""
    directory = RunDirectory(tmp_path)
    directory.write(state(processes=[SupervisedProcess("x", "gateway", 1, 3.5)], supervisor_pid=1))
    assert directory.processes() == []
    found = directory.read()
    assert found is not None and not found.supervisor_lives


def test_a_run_directory_is_held_by_one_supervisor(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with directory.held(), pytest.raises(AlreadyRunning), directory.held():
        raise AssertionError("held twice")
    with directory.held():
        pass


def test_the_fleet_file_is_the_named_one_or_the_local_one_or_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen_fleet(None) == DEFAULT_FLEET
    (tmp_path / "fleet.yaml").touch()
    assert chosen_fleet(None) == tmp_path / "fleet.yaml"
    assert chosen_fleet(Path("other.yaml")) == tmp_path / "other.yaml"
