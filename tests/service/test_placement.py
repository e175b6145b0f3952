"""The placement service with a real Redis and real, if empty, worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis

from tests.service.local_fleet import stand_in_environ, write_fleet_file
from tests.service.processes import wait_until
from trireme.wire.bus.v1.facts_pb2 import Directive, ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb
from trireme.wire.placement.v1.placement_pb2_grpc import PlacementStub

pytestmark = pytest.mark.fleet


@dataclass(slots=True)
class Placement:
    """One placement process after another, on one bus."""

    root: Path
    redis_url: str
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def environ(self) -> dict[str, str]:
        settings = {
            "REDIS_URL": self.redis_url,
            "FLEET": str(self.root / "fleet.yaml"),
            "RUN_DIR": str(self.root),
            "PERIOD_S": "0.05",
            **self.settings,
        }
        named = {f"TRIREME_PLACEMENT_{name}": value for name, value in settings.items()}
        return stand_in_environ(self.root) | named | {"PLACEMENT_TEST": str(self.root)}

    def start(self) -> None:
        with (self.root / "placement.log").open("ab") as log:
            words = [sys.executable, "-m", "trireme.placement"]
            self.process = subprocess.Popen(words, env=self.environ, stdout=log, stderr=log)
        self.address()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def address(self) -> str:
        found: list[str] = []

        def registered() -> bool:
            found[:] = [r.grpc_address for r in self.records("placement") if self.owns(r)]
            return bool(found)

        # After an absence of Redis it is not registered until its next renewal.
        wait_until(registered, what="placement in the registry")
        return found[0]

    def owns(self, record: ProcessRecord) -> bool:
        return self.process is not None and record.pid == self.process.pid

    def records(self, service: str) -> list[ProcessRecord]:
        with Redis.from_url(self.redis_url) as redis:
            values = [redis.get(key) for key in redis.scan_iter("trireme:process:*")]
        records = [ProcessRecord.FromString(value) for value in values if value]
        return [record for record in records if record.service == service]

    @contextmanager
    def stub(self) -> Iterator[PlacementStub]:
        with grpc.insecure_channel(self.address()) as channel:
            yield PlacementStub(channel)

    def state(self) -> pb.GetStateResponse:
        with self.stub() as stub:
            return stub.GetState(pb.GetStateRequest(), timeout=60)

    def wait_until(self, holds: Callable[[pb.GetStateResponse], bool], what: str) -> pb.GetStateResponse:
        wait_until(lambda: holds(self.state()), what=what)
        return self.state()

    def wait_until_settled(self, workers: int) -> pb.GetStateResponse:
        """Return when so many workers live and all take requests."""
        return self.wait_until(
            lambda s: len(s.workers) == workers and all(w.phase == pb.WORKER_PHASE_READY for w in s.workers),
            f"{workers} workers ready",
        )


@pytest.fixture
def placement(tmp_path: Path, redis_url: str) -> Iterator[Placement]:
    write_fleet_file(tmp_path / "fleet.yaml", replicas=2)
    made = Placement(tmp_path, redis_url)
    try:
        yield made
    finally:
        if made.process is not None:
            made.kill()
        for process in psutil.process_iter():
            try:
                if process.environ().get("PLACEMENT_TEST") == str(tmp_path):
                    process.kill()
            except psutil.Error:
                continue


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details()


def test_the_desired_workers_are_started_and_told(placement: Placement) -> None:
    placement.start()
    state = placement.wait_until_settled(2)
    assert [(w.group, w.index, list(w.variants)) for w in state.workers] == [
        ("worker", 0, ["a"]),
        ("worker", 1, ["a"]),
    ]
    (group,) = state.groups
    assert (group.desired_replicas, group.ready_replicas, group.overridden) == (2, 2, False)
    assert state.supervises and state.actions == {"start": 2}
    with grpc.insecure_channel(placement.address()) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_drained_worker_is_replaced_by_another(placement: Placement) -> None:
    placement.start()
    first = placement.wait_until_settled(2).workers[0]
    with placement.stub() as stub:
        stub.Drain(pb.DrainRequest(worker_id=first.worker_id), timeout=60)
    after = placement.wait_until(
        lambda s: first.pid not in [w.pid for w in s.workers] and s.groups[0].ready_replicas == 2,
        "the drained worker is replaced",
    )
    assert sum(worker.restarts for worker in after.workers) == 0  # it was asked to end: no death
    with Redis.from_url(placement.redis_url) as redis:
        entries = redis.xrange("trireme:directives")
    drained = [Directive.FromString(fields[b"f"]).drain.worker_id for _, fields in entries]
    assert drained == [first.worker_id]


def test_a_worker_that_ignores_its_drain_is_killed(placement: Placement) -> None:
    (placement.root / "worker.slow").touch()
    placement.settings["DRAIN_TIMEOUT_S"] = "1"
    placement.start()
    pids = {worker.pid for worker in placement.wait_until_settled(2).workers}
    with placement.stub() as stub:
        stub.Scale(pb.ScaleRequest(group="worker", replicas=0), timeout=60)
    state = placement.wait_until(lambda s: not s.workers, "all are gone")
    assert state.actions["kill"] == 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_variants_come_and_go_by_group_and_by_worker(placement: Placement) -> None:
    placement.start()
    first, second = placement.wait_until_settled(2).workers
    with placement.stub() as stub:
        stub.LoadVariant(pb.LoadVariantRequest(variant="b", group="worker"), timeout=60)
        both = placement.wait_until(lambda s: all(len(w.variants) == 2 for w in s.workers), "b is everywhere")
        assert both.groups[0].overridden
        stub.UnloadVariant(pb.UnloadVariantRequest(variant="a", worker_id=first.worker_id), timeout=60)
        state = placement.wait_until(
            lambda s: sorted(len(w.variants) for w in s.workers) == [1, 2], "a is gone from one"
        )
    by_pid = {worker.pid: sorted(worker.variants) for worker in state.workers}
    assert by_pid == {first.pid: ["b"], second.pid: ["a", "b"]}
    # A worker that is started later serves what its group does, though fleet.yaml says otherwise.
    os.kill(second.pid, signal.SIGKILL)
    placement.wait_until(
        lambda s: any(w.pid not in by_pid and sorted(w.variants) == ["a", "b"] for w in s.workers),
        "the new worker serves both",
    )


def test_wishes_outlive_placement_within_one_run(placement: Placement) -> None:
    placement.settings["RUN_ID"] = "one"
    placement.start()
    placement.wait_until_settled(2)
    with placement.stub() as stub:
        assert stub.Scale(pb.ScaleRequest(group="worker", replicas=3), timeout=60).previous_replicas == 2
    placement.wait_until_settled(3)
    placement.kill()
    placement.start()
    state = placement.wait_until_settled(3)
    assert state.actions == {"adopt": 3} and all(worker.adopted for worker in state.workers)
    placement.kill()
    placement.settings["RUN_ID"] = "two"
    placement.start()
    assert placement.wait_until_settled(2).groups[0].desired_replicas == 2


def test_what_a_worker_started_is_not_adopted_as_a_worker(placement: Placement) -> None:
    placement.start()
    worker = placement.wait_until_settled(2).workers[0]
    environ = psutil.Process(worker.pid).environ()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environ) as helper:
        placement.kill()
        placement.start()
        state = placement.wait_until_settled(2)
        assert helper.pid not in [worker.pid for worker in state.workers]
        helper.kill()


def test_a_worker_that_cannot_start_is_tried_ever_more_slowly(placement: Placement) -> None:
    (placement.root / "worker.fails").touch()
    placement.start()
    state = placement.wait_until(
        lambda s: len(s.workers) == 2 and all(w.crash_looping for w in s.workers), "a crash loop is told"
    )
    assert {worker.last_exit for worker in state.workers} == {"exit status 1"}
    (placement.root / "worker.fails").unlink()
    placement.wait_until_settled(2)


def test_a_worker_that_never_registers_is_replaced(placement: Placement) -> None:
    placement.settings["START_TIMEOUT_S"] = "1"
    placement.settings["WORKER_COMMAND"] = f"{sys.executable} -c 'import time; time.sleep(600)'"
    placement.start()
    state = placement.wait_until(lambda s: any(w.restarts for w in s.workers), "it is killed")
    assert "did not register within 1 s" in " ".join(worker.last_exit for worker in state.workers)


def test_a_command_that_does_not_exist_is_told(placement: Placement) -> None:
    placement.settings["WORKER_COMMAND"] = "/nonexistent/worker"
    placement.start()
    state = placement.wait_until(lambda s: any(w.restarts > 1 for w in s.workers), "it is tried again")
    assert "could not start" in state.workers[0].last_exit


def test_sigterm_stops_the_workers_too(placement: Placement) -> None:
    placement.start()
    pids = [worker.pid for worker in placement.wait_until_settled(2).workers]
    assert placement.process is not None
    placement.process.send_signal(signal.SIGTERM)
    assert placement.process.wait(timeout=60) == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert placement.records("placement") == [] == placement.records("worker")


def test_workers_live_on_while_redis_is_away(placement: Placement, redis_url: str) -> None:
    placement.settings["LEASE_GRACE_S"] = "3"
    placement.start()
    pids = [worker.pid for worker in placement.wait_until_settled(2).workers]
    address = redis_url.removeprefix("redis://").removesuffix("/0")
    # Redis shows its address in its title.
    found = psutil.process_iter(["cmdline"])
    server = next(p for p in found if address in " ".join(p.info["cmdline"] or ()))
    with ExitStack() as stack:
        server.suspend()
        stack.callback(server.resume)
        time.sleep(8.0)  # a lease is 3 s by Redis' own clock: all of them end unseen
    assert [worker.pid for worker in placement.wait_until_settled(2).workers] == pids


def test_wrong_calls_are_refused_and_say_what_is_there(placement: Placement) -> None:
    placement.start()
    placement.wait_until_settled(2)
    with placement.stub() as stub:
        code, said = code_of(lambda: stub.Scale(pb.ScaleRequest(group="nope", replicas=1), timeout=60))
        assert code == grpc.StatusCode.INVALID_ARGUMENT and "fleet.yaml has worker" in said
        code, _ = code_of(lambda: stub.Scale(pb.ScaleRequest(group="worker", replicas=257), timeout=60))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        code, said = code_of(
            lambda: stub.LoadVariant(pb.LoadVariantRequest(variant="c", group="worker"), timeout=60)
        )
        assert code == grpc.StatusCode.NOT_FOUND and "fleet.yaml has a, b" in said
        for worker_id in ("", "worker-of-another"):
            code, _ = code_of(lambda w=worker_id: stub.Drain(pb.DrainRequest(worker_id=w), timeout=60))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert placement.state().groups[0].desired_replicas == 2


def test_where_others_start_the_workers_it_only_looks_and_passes_on(placement: Placement) -> None:
    placement.start()
    worker = placement.wait_until_settled(2).workers[0]
    placement.kill()
    placement.settings["SUPERVISE"] = "false"
    placement.start()
    state = placement.wait_until(lambda s: len(s.workers) == 2, "both are seen")
    assert not state.supervises
    with placement.stub() as stub:
        stub.LoadVariant(pb.LoadVariantRequest(variant="b", worker_id=worker.worker_id), timeout=60)
        code, said = code_of(lambda: stub.Scale(pb.ScaleRequest(group="worker", replicas=1), timeout=60))
        assert code == grpc.StatusCode.INVALID_ARGUMENT and "Deployment" in said
        unknown = pb.LoadVariantRequest(variant="c", worker_id=worker.worker_id)
        code, said = code_of(lambda: stub.LoadVariant(unknown, timeout=60))
        assert code == grpc.StatusCode.NOT_FOUND and "fleet.yaml has a, b" in said
    placement.wait_until(
        lambda s: ["a", "b"] in [sorted(w.variants) for w in s.workers], "the worker says it serves b"
    )
