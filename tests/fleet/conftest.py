"""A whole fleet of real processes: two gateways, two schedulers, two workers, and the rest."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import free_port
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

REPOSITORY = Path(__file__).resolve().parents[2]
VARIANT = "trireme-py-1m"


@dataclass
class Fleet:
    """A running fleet and the means to hurt it."""

    run_dir: Path

    @property
    def state(self) -> dict[str, object]:
        return json.loads((self.run_dir / "fleet.json").read_text(encoding="utf-8"))

    @property
    def grpc(self) -> list[str]:
        return list(self.state["grpc"])  # type: ignore[call-overload]

    @property
    def http(self) -> list[str]:
        return list(self.state["http"])  # type: ignore[call-overload]

    def pid_of(self, name: str) -> int:
        """The pid of a supervised process, as it is now."""
        found = [p for p in self.state["processes"] if p["name"] == name]  # type: ignore[attr-defined,index]
        assert found, f"no process {name}"
        return int(found[0]["pid"])

    async def living(self, service: str) -> list[ProcessRecord]:
        """The registered processes of a service."""
        async with open_redis(str(self.state["redis_url"])) as redis:
            return await Registry(redis, Keys(str(self.state["bus_prefix"]))).living(service)

    async def ready_workers(self, count: int, *, within_s: float = 60.0) -> list[ProcessRecord]:
        """The healthy workers, once there are `count`; a dead one's lease may hold for a while yet."""
        deadline_s = time.monotonic() + within_s
        while True:
            workers = await self.living("worker")
            found = [record for record in workers if record.healthy and psutil.pid_exists(record.pid)]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline_s, f"{len(found)} of {count} workers are ready"
            await asyncio.sleep(0.1)

    async def busiest_worker(self, workers: Sequence[ProcessRecord] = ()) -> ProcessRecord:
        """The healthy worker, of these or of all, that most requests are assigned to now."""
        workers = workers or await self.ready_workers(2)
        async with open_redis(str(self.state["redis_url"])) as redis:
            keys = Keys(str(self.state["bus_prefix"]))
            loads = [int(await redis.hget(keys.load(worker.id), "requests") or 0) for worker in workers]
        return workers[loads.index(max(loads))]

    @asynccontextmanager
    async def held(self, workers: Sequence[ProcessRecord]) -> AsyncIterator[ProcessRecord]:
        """The busiest of these workers; none of them goes on while the block runs.

        So what was under way when the block began is still under way when something is done about it.
        """
        with stopped(*(pid for worker in workers for pid in (worker.pid, engine_pid(worker.pid)))):
            yield await self.busiest_worker(workers)

    def kill(self, name: str) -> None:
        """kill -9 a supervised process."""
        os.kill(self.pid_of(name), signal.SIGKILL)

    async def until_restarted(self, name: str, old_pid: int, *, within_s: float = 60.0) -> None:
        """Return when the supervisor has started `name` again."""
        deadline_s = time.monotonic() + within_s
        while True:
            pid = self.pid_of(name)
            if pid not in (0, old_pid) and psutil.pid_exists(pid):
                return
            assert time.monotonic() < deadline_s, f"{name} was not restarted"
            await asyncio.sleep(0.1)


def engine_pid(worker_pid: int) -> int:
    """The process of a worker's engines."""
    [child] = [p for p in psutil.Process(worker_pid).children() if "engine_process" in str(p.cmdline())]
    return child.pid


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """The processes hang while the block runs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def command(run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a `trireme` command on the fleet of `run_dir`."""
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    arguments = [sys.executable, "-m", "trireme.cli", *words, "--run-dir", str(run_dir)]
    return subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=170)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("fleet"), max_sequences=32, kv_mib=64) as found:
        yield found


@contextmanager
def running(
    directory: Path,
    *,
    encoders: Mapping[str, Path] | None = None,
    more_variants: Mapping[str, object] | None = None,
    changes: Mapping[str, Mapping[str, object]] | None = None,
    **worker: object,
) -> Iterator[Fleet]:
    """A fleet with two workers of these options until the block ends; it must leave nothing behind.

    `encoders`: checkpoints of further models, by name. `more_variants`: of the model, which no worker loads.
    `changes`: to sections of the fleet file.
    """
    own = {"checkpoint": str(REPOSITORY / "checkpoints" / VARIANT)}
    run_dir = directory / "run"
    config = directory / "fleet.yaml"
    document: dict[str, object] = {
        "models": {
            "py": {"default": VARIANT, "variants": {VARIANT: own, **(more_variants or {})}},
            **{
                name: {"variants": {f"{name}-v": {"checkpoint": str(checkpoint)}}}
                for name, checkpoint in (encoders or {}).items()
            },
        },
        "workers": [{"name": "worker", "replicas": 2, **worker}],
        "gateway": {
            "replicas": 2,
            "http": f"127.0.0.1:{free_port(2)}",
            "grpc": f"127.0.0.1:{free_port(2)}",
        },
        "scheduler": {"replicas": 2},
        "kvstore": {"dram_mib": 64, "ssd_mib": 64},
    }
    for section, change in (changes or {}).items():
        document[section] = {**document.get(section, {}), **change}  # type: ignore[dict-item]
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    started = command(run_dir, "up", "--detach", "--config", str(config))
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield Fleet(run_dir)
    finally:
        stopped = command(run_dir, "down")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TRIREME_RUN_DIR") == str(run_dir):
                    marked.append(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        assert not marked, f"down left processes: {marked}"
