"""A whole fleet under `trireme up`, with stand-ins for all services but Redis and placement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import free_port
from tests.service.processes import REPOSITORY, wait_until
from trireme.cli.run_directory import FleetState, RunDirectory, SupervisedProcess

STAND_INS = REPOSITORY / "tests" / "service" / "stand_ins"


def stand_in_environ(steering: Path) -> dict[str, str]:
    """An environment in which the stand-ins shadow the services; files in `steering` steer them."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRIREME_")}
    environ["PYTHONPATH"] = f"{STAND_INS}:{REPOSITORY}/libs:{REPOSITORY}/services"
    environ["STAND_IN_DIR"] = str(steering)
    return environ


def write_fleet_file(path: Path, *, replicas: int = 2, gateways: int = 1) -> Path:
    """A fleet of workers that serve variant `a` of model `m`, on free ports."""
    http, grpc = free_port(gateways), free_port(gateways)
    path.write_text(
        f"""
models: {{m: {{variants: {{a: {{checkpoint: a}}, b: {{checkpoint: b}}}}}}}}
workers: [{{name: worker, replicas: {replicas}, device: "null", variants: [a]}}]
gateway: {{replicas: {gateways}, http: "127.0.0.1:{http}", grpc: "127.0.0.1:{grpc}"}}
scheduler: {{replicas: 2}}
""",
        encoding="utf-8",
    )
    return path


@dataclass(frozen=True, slots=True)
class LocalFleet:
    """Paths of one fleet, and the commands on it."""

    root: Path

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory.at(self.root / "run")

    @property
    def steering(self) -> Path:
        return self.root / "steering"

    def trireme(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one `trireme` command on the fleet."""
        return subprocess.run(
            [sys.executable, "-m", "trireme.cli", *words, "--run-dir", str(self.directory.path)],
            env=stand_in_environ(self.steering),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def up(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.trireme("up", "--detach", "--config", str(self.root / "fleet.yaml"), *words)

    def status(self) -> dict[str, Any]:
        """What `trireme status --json` says; empty where it says nothing."""
        answer = self.trireme("status", "--json").stdout
        return dict(json.loads(answer)) if answer else {}

    @property
    def state(self) -> FleetState:
        state = self.directory.read()
        assert state is not None
        return state

    def process(self, name: str) -> SupervisedProcess:
        return next(process for process in self.state.processes if process.name == name)

    def worker_pids(self) -> list[int]:
        """Pids of the workers that live now."""
        found = []
        for process in self.marked():
            # One that ends while it is looked at is none.
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:] == ["-m", "trireme.worker"]:
                    found.append(process.pid)
        return sorted(found)

    def marked(self) -> list[psutil.Process]:
        living = []
        for found in self.directory.processes():
            with suppress(psutil.NoSuchProcess):
                living.append(psutil.Process(found.pid))
        return living

    def is_ready(self) -> bool:
        return self.trireme("status").returncode == 0

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def wait_until_replaced(self, name: str, pid: int) -> None:
        """Return when a process of that name lives again, and all is ready."""
        wait_until(lambda: self.process(name).pid not in (0, pid), what=f"{name} starts again")
        wait_until(self.is_ready, what="ready again")

    def wait_until_whole(self, workers: int = 2) -> None:
        """Return when so many workers live and all is ready: a death is noticed a moment after it."""
        wait_until(lambda: len(self.worker_pids()) == workers, what=f"{workers} workers live")
        wait_until(self.is_ready, what="ready again")


@contextmanager
def local_fleet(root: Path, *, replicas: int = 2, gateways: int = 1) -> Iterator[LocalFleet]:
    """Paths and files for a fleet below `root`; nothing of it is left afterwards."""
    (root / "steering").mkdir()
    write_fleet_file(root / "fleet.yaml", replicas=replicas, gateways=gateways)
    fleet = LocalFleet(root)
    try:
        yield fleet
    finally:
        for process in fleet.marked():
            process.kill()
        state = fleet.directory.read()
        if state is not None and state.supervisor_lives:
            fleet.kill(state.supervisor_pid)
        for process in fleet.marked():
            process.kill()
