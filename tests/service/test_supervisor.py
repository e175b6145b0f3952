"""`trireme up` with real processes: whatever is killed comes back, and `down` leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from redis import Redis

from tests.service.local_fleet import LocalFleet, local_fleet, stand_in_environ
from tests.service.processes import wait_until
from trireme.runtime.child_processes import LOG_LIMIT_BYTES, identify

pytestmark = pytest.mark.fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with local_fleet(tmp_path) as made:
        yield made


@pytest.fixture
def running(fleet: LocalFleet) -> LocalFleet:
    begun = fleet.up()
    assert begun.returncode == 0, begun.stderr
    return fleet


def test_up_says_where_to_call_and_how_long_each_part_took(fleet: LocalFleet) -> None:
    begun = fleet.up()
    assert begun.returncode == 0, begun.stderr
    assert f"http://{fleet.state.http[0]}/v1" in begun.stdout
    names = [phase.name for phase in fleet.state.timeline]
    assert names[0] == "redis" and names[-1] == "ready"
    expected = {"kvstore", "power", "placement", "scheduler-0", "scheduler-1", "gateway-0", "workers"}
    assert set(names) == expected | {"redis", "ready"}
    seconds = [phase.seconds for phase in fleet.state.timeline]
    assert seconds == sorted(seconds)
    # A health check that comes late is not waited for.
    wait_until(
        lambda: {service["health"] for service in fleet.status()["services"]} == {"SERVING", "up"},
        what="all services are seen to serve",
    )
    status = fleet.status()
    assert [group["ready"] for group in status["groups"]] == [2]
    assert [worker["variants"][0]["variant"] for worker in status["workers"]] == ["a", "a"]


def test_each_child_comes_back_after_kill_9(running: LocalFleet) -> None:
    pids = {process.name: process.pid for process in running.state.processes}
    for name, pid in pids.items():
        if name not in ("redis", "placement"):
            running.kill(pid)
    for name, pid in pids.items():
        if name not in ("redis", "placement"):
            running.wait_until_replaced(name, pid)
            assert running.process(name).last_exit == "killed by SIGKILL"
            assert running.process(name).restarts == 1


def test_redis_comes_back_after_kill_9_on_its_port_with_its_data(running: LocalFleet) -> None:
    url = running.state.redis_url
    with Redis.from_url(url) as redis:
        redis.set("kept", "yes")
        redis.xadd("stream", {"f": "fact"})
    # everysec: what is older than a second is on disk; the kernel keeps the rest of a killed process.
    pid = running.process("redis").pid
    running.kill(pid)
    running.wait_until_replaced("redis", pid)
    assert running.state.redis_url == url
    with Redis.from_url(url) as redis:
        assert redis.get("kept") == b"yes"
        assert redis.xlen("stream") == 1


def test_no_worker_is_restarted_because_redis_was_away(running: LocalFleet) -> None:
    workers = running.worker_pids()
    pid = running.process("redis").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        # Longer than a lease and the grace together: every lease ends unseen.
        wait_until(lambda: running.status().get("bus") == "away", what="the bus is away")
        time.sleep(10.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(running.is_ready, what="ready again")
    assert running.worker_pids() == workers
    assert running.process("redis").pid == pid


def test_a_dead_worker_is_replaced_and_a_frozen_one_too(running: LocalFleet) -> None:
    killed, frozen = running.worker_pids()
    running.kill(killed)
    wait_until(lambda: killed not in running.worker_pids(), what="the killed worker is gone")
    running.wait_until_whole()
    os.kill(frozen, signal.SIGSTOP)
    wait_until(lambda: frozen not in running.worker_pids(), what="the frozen worker is killed")
    running.wait_until_whole()
    assert len(running.worker_pids()) == 2
    exits = [worker["last_exit"] for worker in running.status()["workers"]]
    assert any("SIGKILL: lives but made no progress" in how for how in exits)


def test_a_frozen_service_is_replaced(running: LocalFleet) -> None:
    pid = running.process("gateway-0").pid
    os.kill(pid, signal.SIGSTOP)
    running.wait_until_replaced("gateway-0", pid)
    assert identify(pid) is None


def test_a_placement_that_was_killed_adopts_the_living_workers(running: LocalFleet) -> None:
    workers, pid = running.worker_pids(), running.process("placement").pid
    running.kill(pid)
    running.wait_until_replaced("placement", pid)
    assert running.worker_pids() == workers
    assert any(line.split(" ", 1)[1].startswith("adopted") for line in running.status()["recent"])
    # An adopted worker is looked after like any other.
    running.kill(workers[0])
    wait_until(lambda: workers[0] not in running.worker_pids(), what="the adopted worker is gone")
    running.wait_until_whole()
    assert workers[1] in running.worker_pids() and len(running.worker_pids()) == 2


def test_a_worker_that_died_while_placement_was_away_is_started_once(running: LocalFleet) -> None:
    workers, pid = running.worker_pids(), running.process("placement").pid
    os.kill(pid, signal.SIGSTOP)
    running.kill(workers[0])
    running.kill(pid)
    running.wait_until_replaced("placement", pid)
    running.wait_until_whole()
    assert len(running.worker_pids()) == 2 and workers[1] in running.worker_pids()


def test_what_was_scaled_outlives_placement_but_not_the_fleet(running: LocalFleet) -> None:
    assert running.trireme("scale", "worker=3").returncode == 0
    assert len(running.worker_pids()) == 3
    pid = running.process("placement").pid
    running.kill(pid)
    running.wait_until_replaced("placement", pid)
    assert len(running.worker_pids()) == 3
    assert running.trireme("scale", "worker=1").returncode == 0
    assert len(running.worker_pids()) == 1
    assert running.trireme("down").returncode == 0
    assert running.up().returncode == 0
    assert len(running.worker_pids()) == 2


def test_down_leaves_no_process_and_may_be_repeated(running: LocalFleet) -> None:
    everything = [process.pid for process in running.marked()] + [running.state.supervisor_pid]
    assert len(set(everything)) == 10  # the supervisor, 7 services, 2 workers
    assert running.trireme("down").returncode == 0
    assert [pid for pid in everything if identify(pid) is not None] == []
    assert running.state.phase == "stopped"
    again = running.trireme("down")
    assert again.returncode == 0 and "no fleet runs" in again.stdout


def test_down_finds_what_a_killed_supervisor_left(running: LocalFleet) -> None:
    running.kill(running.state.supervisor_pid)
    refused = running.up()
    assert refused.returncode == 2 and "trireme down" in refused.stderr
    assert running.trireme("down").returncode == 0
    assert running.marked() == []
    assert running.up().returncode == 0


def test_a_second_up_in_the_same_directory_is_refused(running: LocalFleet) -> None:
    refused = running.up()
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "runs already" in refused.stderr
    assert running.is_ready()


def test_a_port_in_use_names_the_key_to_change(fleet: LocalFleet) -> None:
    address = yaml.safe_load((fleet.root / "fleet.yaml").read_text())["gateway"]["http"]
    host, port = address.split(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        refused = fleet.up()
    assert refused.returncode == 2
    assert refused.stderr == f"trireme: {address} is in use: change gateway.http in {fleet.root}/fleet.yaml\n"


def test_a_service_that_cannot_start_ends_the_start_with_its_last_words(fleet: LocalFleet) -> None:
    (fleet.steering / "power.fails").touch()
    refused = fleet.up()
    assert refused.returncode == 1
    assert "power does not start (exit status 1)" in refused.stderr
    assert "power was told to fail" in refused.stderr
    assert fleet.marked() == []


def test_a_worker_that_cannot_start_ends_the_start_too(fleet: LocalFleet) -> None:
    (fleet.steering / "worker.fails").touch()
    refused = fleet.up()
    assert refused.returncode == 1
    assert "worker was told to fail" in refused.stderr
    assert fleet.marked() == []


def test_a_foreground_fleet_stops_in_order_on_ctrl_c(fleet: LocalFleet) -> None:
    words = ["up", "--config", str(fleet.root / "fleet.yaml"), "--run-dir", str(fleet.directory.path)]
    with subprocess.Popen(
        [sys.executable, "-m", "trireme.cli", *words],
        env=stand_in_environ(fleet.steering),
        stdout=subprocess.PIPE,
        text=True,
    ) as supervisor:
        wait_until(lambda: fleet.directory.state_file.exists() and fleet.state.phase == "ready")
        supervisor.send_signal(signal.SIGINT)
        output, _ = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0
    assert output.rstrip().endswith("stopped")
    assert fleet.marked() == []


def test_a_second_ctrl_c_waits_for_nobody(fleet: LocalFleet) -> None:
    (fleet.steering / "worker.slow").touch()
    (fleet.steering / "gateway.slow").touch()
    words = ["up", "--config", str(fleet.root / "fleet.yaml"), "--run-dir", str(fleet.directory.path)]
    with subprocess.Popen(
        [sys.executable, "-m", "trireme.cli", *words],
        env=stand_in_environ(fleet.steering),
        stdout=subprocess.PIPE,
        text=True,
    ) as supervisor:
        wait_until(lambda: fleet.directory.state_file.exists() and fleet.state.phase == "ready")
        supervisor.send_signal(signal.SIGINT)
        wait_until(lambda: fleet.state.phase == "stopping")
        supervisor.send_signal(signal.SIGINT)
        output, _ = supervisor.communicate(timeout=38)  # a gateway alone may take 40 s to end
    assert "asked twice" in output
    assert fleet.marked() == []


def test_logs_are_bounded_while_their_writers_go_on(running: LocalFleet) -> None:
    log_path = running.directory.log_of("redis")
    with log_path.open("ab") as log_file:
        log_file.truncate(LOG_LIMIT_BYTES + 1)
    wait_until(lambda: log_path.stat().st_size < LOG_LIMIT_BYTES, what="the log is cut")
    assert log_path.with_name("redis.log.1").stat().st_size > LOG_LIMIT_BYTES
    pid = running.process("redis").pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: b"User requested shutdown" in log_path.read_bytes(), what="Redis logs on")
