"""The chart's containers, run here as processes: their environment, volumes, probes, test and end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, redis_binary
from tests.install.charts import Object, Pod, environment, fleet_file, of_kind, pods, render_values
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

START_S = 90.0
"""For a slow machine; a start takes seconds."""
MODEL = "/opt/trireme/share/checkpoints/trireme-py-1m"
VALUES: Object = {
    "models": {"small": {"variants": {"small": {"checkpoint": MODEL}}}},
    "workers": [{"name": "cpu", "engine": {"kv_mib": 32, "swap_mib": 0}, "drainSeconds": 5}],
    "kvstore": {"dramMib": 32, "ssdMib": 64},
    "gateway": {"drainSeconds": 5, "allowAnonymous": True},
}


class Machine:
    """One address, one folder for each volume, one process for each container."""

    def __init__(
        self, folder: Path, objects: list[Object], *, pod: str, cluster: Machine | None = None
    ) -> None:
        """`cluster` is where the release's services are; None: here."""
        # Loopback has 2^24 addresses: the chart's fixed ports are free on one of them.
        self.address = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
        self.cluster = cluster.address if cluster is not None else self.address
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.fields = {"status.podIP": self.address, "metadata.name": pod, "spec.nodeName": "node-1"}
        fleet = folder / "fleet"
        fleet.mkdir()
        text = fleet_file(objects).replace("/opt/trireme/share", str(REPOSITORY))
        (fleet / "fleet.yaml").write_text(text)
        (secret,) = of_kind(objects, "Secret")
        password = folder / "redis-password"
        password.mkdir()
        (password / "password").write_bytes(base64.b64decode(secret["data"]["password"]))
        self.redis_url = f"redis://{self.cluster}:6379/0?password_file={password / 'password'}"
        # The image has the server on its path.
        server = folder / "bin" / "redis-server"
        server.parent.mkdir()
        server.write_text(f'#!/bin/sh\nexec {redis_binary()} "$@" --bind {self.address}\n')
        server.chmod(0o755)

    def in_place(self, pod: Pod, container: Object, text: str) -> str:
        """A path, an address or a name of the cluster, as it is here."""
        for mount in container["volumeMounts"]:
            place = self.folder / (mount["name"] if mount["name"] != "tmp" else f"tmp-{container['name']}")
            place.mkdir(exist_ok=True)
            if text == mount["mountPath"] or text.startswith(mount["mountPath"] + "/"):
                return str(place) + text.removeprefix(mount["mountPath"])
            if f"={mount['mountPath']}/" in text:
                text = text.replace(f"={mount['mountPath']}/", f"={place}/")
                break
        for name in ("blue-trireme-redis", "blue-trireme-gateway"):
            text = text.replace(f"{name}.serving.svc.cluster.local", self.cluster)
        return text.replace("0.0.0.0", self.address)

    @contextmanager
    def running(self, pod: Pod, container: Object) -> Iterator[subprocess.Popen[bytes]]:
        """The container's process, which must end in order when it is asked to."""
        words = [self.in_place(pod, container, word) for word in container["command"]]
        programs = {"python": [sys.executable], "sh": ["sh"]}
        variables = {
            key: self.in_place(pod, container, value)
            for key, value in environment({"env": [], **container}, secrets={}, fields=self.fields).items()
        }
        log = self.folder / f"{container['name']}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*programs[words[0]], *words[1:]],
                env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **variables},
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                yield process
                process.terminate()
                grace_s = pod.spec["terminationGracePeriodSeconds"]
                assert process.wait(timeout=grace_s) == 0, log.read_text()[-2000:]
            finally:
                process.kill()
                process.wait()

    def answers(self, pod: Pod, probe: Object) -> bool:
        """Whether a probe succeeds now."""
        url = f"http://{self.address}:{pod.ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def scrape(self, port: int) -> dict[str, float]:
        """Samples by name and labels."""
        with urllib.request.urlopen(f"http://{self.address}:{port}/metrics", timeout=60) as response:
            lines = [
                line.split() for line in response.read().decode().splitlines() if line[:1] not in ("#", "")
            ]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def eventually(check: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + START_S
    while not check():
        assert time.monotonic() < deadline_s, f"{what} did not happen"
        time.sleep(0.1)


async def living(redis_url: str, bus_prefix: str) -> list[ProcessRecord]:
    async with open_redis(redis_url) as client:
        return await Registry(client, Keys(bus_prefix)).living()


@pytest.mark.timeout(240)
def test_the_rendered_fleet_starts_answers_its_test_and_drains(tmp_path: Path) -> None:
    objects = render_values(VALUES)
    machine = Machine(tmp_path / "1", objects, pod="pod-1")
    other = Machine(tmp_path / "2", objects, pod="pod-2", cluster=machine)
    found = {pod.service: pod for pod in pods(objects)}
    (store,) = found["worker"].spec["initContainers"]
    (worker,) = found["worker"].spec["containers"]
    with ExitStack() as stack:
        (redis,) = found["redis"].spec["containers"]
        stack.enter_context(machine.running(found["redis"], redis))
        stack.enter_context(other.running(found["worker"], store))
        for service in ("scheduler", "power", "gateway"):
            (container,) = found[service].containers
            stack.enter_context(machine.running(found[service], container))
        pod = stack.enter_context(ExitStack())
        for container in (store, worker):
            pod.enter_context(machine.running(found["worker"], container))
        for service in ("scheduler", "power", "worker", "gateway"):
            for container in found[service].containers:
                for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if kind in container:
                        probe = container[kind]
                        eventually(
                            lambda p=found[service], q=probe: machine.answers(p, q),  # type: ignore[misc]
                            f"{container['name']}: {kind}",
                        )

        (test,) = found["test"].spec["containers"]
        words = [machine.in_place(found["test"], test, word) for word in test["command"]]
        assert words[0] == "trireme"
        answer = subprocess.run(
            [sys.executable, "-m", "trireme.cli", *words[1:]], capture_output=True, timeout=60, cwd=tmp_path
        )
        assert answer.returncode == 0, answer.stderr.decode()
        assert answer.stdout.strip()

        records = asyncio.run(living(machine.redis_url, "serving.blue-trireme"))
        by_service = {record.service: record for record in records if record.node != "pod-2"}
        assert by_service.keys() == {"gateway", "scheduler", "worker", "kvstore", "power"}
        assert by_service["worker"].node == by_service["kvstore"].node == "pod-1"
        assert by_service["worker"].meter_node == by_service["power"].node == "node-1"
        assert by_service["worker"].grpc_address == f"{machine.address}:7030"

        # A history reaches the store through the memory that the pod's containers share.
        body = {"model": "small", "prompt": "def read_lines(path):\n" * 12, "max_tokens": 4, "temperature": 0}
        call = urllib.request.Request(
            f"http://{machine.address}:8000/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 4
        eventually(lambda: machine.scrape(7041)["trireme_kv_committed_total"] > 0, "a block saved")
        eventually(lambda: machine.scrape(7041)["trireme_kv_peers"] == 1, "stores knowing each other")

        # The pod goes, and its volumes with it: the other pod's store has the history then.
        assert other.scrape(7041)['trireme_kv_blocks{tier="dram"}'] == 0
        pod.close()
        assert other.scrape(7041)['trireme_kv_blocks{tier="dram"}'] > 0
