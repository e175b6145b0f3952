"""The placement service on a cluster: real processes and Redis, and an API server over real HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import Redis

from tests.conftest import free_port
from tests.service.processes import REPOSITORY, service, wait_until
from tests.service.stand_ins.kubernetes_api import Cluster, ServerThread, Status, api_server_thread
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.errors import InvalidConfiguration
from trireme.placement.__main__ import open_backend
from trireme.placement.settings import Settings
from trireme.runtime.clock import SystemClock
from trireme.runtime.fleet import load_fleet
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb
from trireme.wire.placement.v1.placement_pb2_grpc import PlacementStub

pytestmark = pytest.mark.fleet

FLEET = """
models: {m: {variants: {a: {checkpoint: a}, b: {checkpoint: b}}}}
workers:
  - {name: worker, replicas: 2, device: "null"}
  - {name: auto, replicas: 1, device: "null"}
"""


def labels(group: str, scaled_by: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/instance": "blue",
        "app.kubernetes.io/component": f"worker-{group}",
        "trireme/service": "worker",
        "trireme/scaled-by": scaled_by,
    }


@dataclass
class Placements:
    """Replicas of placement on one cluster and one bus."""

    root: Path
    redis_url: str
    server: ServerThread
    stack: ExitStack
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, node: str) -> None:
        config = self.server.server.kubeconfig(self.root / "kubeconfig")
        process = service(
            "placement",
            self.root / f"{node}.log",
            redis_url=self.redis_url,
            fleet=self.root / "fleet.yaml",
            backend="kubernetes",
            kubeconfig=config,
            namespace="serving",
            release_selector="app.kubernetes.io/instance=blue",
            node=node,
            period_s=0.1,
            watch_s=2,
        )
        self.running[node] = self.stack.enter_context(process)
        wait_until(lambda: self.record(node) is not None, what=f"{node} in the registry")

    def record(self, node: str) -> ProcessRecord | None:
        with Redis.from_url(self.redis_url) as redis:
            values = [redis.get(key) for key in redis.scan_iter("trireme:process:*")]
        records = [ProcessRecord.FromString(value) for value in values if value]
        pid = self.running[node].pid
        return next((r for r in records if r.service == "placement" and r.pid == pid), None)

    def address(self, node: str) -> str:
        record = self.record(node)
        assert record is not None
        return record.grpc_address

    def state(self, node: str) -> pb.GetStateResponse:
        with grpc.insecure_channel(self.address(node)) as channel:
            return PlacementStub(channel).GetState(pb.GetStateRequest(), timeout=60)

    def trireme(self, *words: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
        return subprocess.run(
            [sys.executable, "-m", "trireme.cli", *words],
            env=environ,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def leaders(self) -> list[str]:
        return [node for node in self.running if self.state(node).status == "ok"]


@pytest.fixture
def placements(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Placements]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "fleet.yaml").write_text(FLEET)
    cluster = Cluster()
    cluster.install("blue-worker", labels("worker", "placement"))
    cluster.install("blue-auto", labels("auto", "hpa"), replicas=4)
    with ExitStack() as stack:
        server = stack.enter_context(api_server_thread(cluster, free_port()))
        yield Placements(tmp_path, redis_url, server, stack)


@pytest.mark.timeout(300)
def test_one_of_two_replicas_scales_what_is_asked_of_either(placements: Placements) -> None:
    cluster = placements.server.server.cluster
    placements.start("one")
    wait_until(lambda: cluster.replicas("blue-worker") == 2, what="as fleet.yaml says")
    placements.start("two")
    wait_until(lambda: placements.state("two").status.startswith("standby: "), what="the second stands by")
    wait_until(lambda: placements.leaders() == ["one"], what="the first leads")

    # Asked of the one that does not lead, by the command that people use.
    told = placements.trireme("scale", "worker=3", "--placement", placements.address("two"))
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "worker: 2 -> 3"
    assert cluster.replicas("blue-worker") == 3
    state = placements.state("two")
    assert [(g.group, g.desired_replicas, g.ready_replicas, g.overridden) for g in state.groups] == [
        ("worker", 3, 3, True),
        ("auto", 4, 4, False),
    ]
    assert [w.pod for w in state.workers if w.group == "worker"] == [
        name for (kind, name) in sorted(cluster.objects) if kind == "pods" and "blue-worker" in name
    ]
    assert all(w.phase == pb.WORKER_PHASE_READY for w in state.workers)

    refused = placements.trireme("scale", "auto=1", "--placement", placements.address("one"))
    assert refused.returncode != 0 and "scaled by hpa" in refused.stderr

    # While the API is away a wish is taken and kept, and the last picture is shown.
    placements.server.do(placements.server.server.stop)
    wait_until(lambda: placements.state("one").status.startswith("degraded"), what="its absence is told")
    with grpc.insecure_channel(placements.address("two")) as channel:
        stub = PlacementStub(channel)
        assert stub.Scale(pb.ScaleRequest(group="worker", replicas=1), timeout=60).previous_replicas == 3
    assert len([w for w in placements.state("one").workers if w.group == "worker"]) == 3

    # The leader is killed meanwhile: the other one makes it good, once the Lease is free.
    placements.running.pop("one").kill()
    placements.server.do(placements.server.server.start)
    wait_until(lambda: cluster.replicas("blue-worker") == 1, what="the wish is carried out")
    wait_until(lambda: placements.leaders() == ["two"], what="the other leads")

    # A person overrules it: that is told, and not fought.
    placements.server.do(lambda: cluster.update_replicas("blue-worker", 6, manager="kubectl"))
    wait_until(lambda: bool(placements.state("two").groups[0].left_because), what="the conflict is told")
    told = placements.trireme("scale", "worker=2", "--placement", placements.address("two"))
    assert told.returncode != 0 and "kubectl" in told.stderr
    assert cluster.replicas("blue-worker") == 6

    # What leaves in order leaves the workers, and its Lease to others.
    process = placements.running["two"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "holderIdentity" not in cluster.get("leases", "trireme-placement")["spec"]
    assert cluster.replicas("blue-worker") == 6


@pytest.mark.timeout(300)
def test_wrong_calls_are_refused_and_say_what_to_do(placements: Placements) -> None:
    # Nor is an API that refuses everything a reason not to start.
    placements.server.do(
        lambda: setattr(placements.server.server, "fault", lambda call: Status(403, "Forbidden", "no role"))
    )
    placements.start("one")
    wait_until(lambda: "no role" in placements.state("one").status, what="what is missing is told")
    with grpc.insecure_channel(placements.address("one")) as channel:
        stub = PlacementStub(channel)
        wrong = [
            (lambda: stub.Scale(pb.ScaleRequest(group="nope", replicas=1), timeout=60), "worker, auto"),
            (lambda: stub.Scale(pb.ScaleRequest(group="worker", replicas=257), timeout=60), "0..256"),
            (
                lambda: stub.LoadVariant(pb.LoadVariantRequest(variant="b", group="worker"), timeout=60),
                "workers[].engine.variants",
            ),
            (
                lambda: stub.UnloadVariant(pb.UnloadVariantRequest(variant="b", worker_id="x"), timeout=60),
                "no worker 'x'",
            ),
        ]
        for call, said in wrong:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert said in refused.value.details()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "nomad"}, "processes or kubernetes"),
        ({}, "TRIREME_PLACEMENT_RELEASE_SELECTOR"),
        ({"release_selector": "a=b", "lease_s": 9}, "15 s at least"),
        ({"release_selector": "a=b", "watch_s": 60}, "raise stale_s"),
        ({"release_selector": "a=b"}, "TRIREME_PLACEMENT_KUBECONFIG"),
        ({"release_selector": "a=b", "kubeconfig": Path("absent")}, "TRIREME_PLACEMENT_KUBECONFIG"),
    ],
)
async def test_wrong_settings_are_named(
    tmp_path: Path, redis_url: str, settings: dict[str, Any], said: str
) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    chosen = Settings(redis_url=redis_url, fleet=path, **({"backend": "kubernetes"} | settings))
    async with open_redis(redis_url) as redis, AsyncExitStack() as stack:
        registry = Registry(redis, Keys("trireme"))
        opening = open_backend(chosen, load_fleet(path), redis, registry, SystemClock(), "one", stack)
        with pytest.raises(InvalidConfiguration) as refused:
            await opening
    assert said in f"{refused.value.param} {refused.value}"
