"""A fleet of its own for a measurement, and the file its figures go to."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
CHECKPOINTS = REPOSITORY / "checkpoints"
MODEL = "trireme-py"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningFleet:
    """Where a fleet listens, and the pids of its processes by name."""

    grpc: list[str]
    http: list[str]
    run_dir: Path


def fleet_document(
    *, workers: int, device: str = "cpu", variant: str = "trireme-py-6m", gateways: int = 1, **worker: object
) -> dict[str, object]:
    """A fleet file with one variant and one group of workers, on free ports."""
    return {
        "models": {MODEL: {"variants": {variant: {"checkpoint": str(CHECKPOINTS / variant)}}}},
        "workers": [
            {"name": "worker", "replicas": workers, "device": device, "variants": [variant], **worker}
        ],
        "gateway": {
            "replicas": gateways,
            "http": f"127.0.0.1:{free_block(gateways)}",
            "grpc": f"127.0.0.1:{free_block(gateways)}",
        },
    }


@contextmanager
def running(
    document: dict[str, object], variables: Mapping[str, str] | None = None
) -> Iterator[RunningFleet]:
    """Run the fleet of a fleet file until the block ends, with these variables beside its environment's."""
    with tempfile.TemporaryDirectory(prefix="trireme-bench-") as directory:
        run_dir = Path(directory)
        path = run_dir / "fleet.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "trireme.cli"]
        environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
        gateway = document.get("gateway")
        if not isinstance(gateway, dict) or "keys" not in gateway:
            environ["TRIREME_GATEWAY_TRUST_TENANT_HEADER"] = "true"  # the load names its tenants
        environ.update(variables or {})
        up = [*command, "up", "--detach", "--config", str(path), "--run-dir", str(run_dir / "run")]
        subprocess.run(up, check=True, env=environ, stdout=subprocess.DEVNULL)
        try:
            state = json.loads((run_dir / "run" / "fleet.json").read_text(encoding="utf-8"))
            yield RunningFleet(grpc=state["grpc"], http=state["http"], run_dir=run_dir / "run")
        finally:
            down = [*command, "down", "--run-dir", str(run_dir / "run")]
            subprocess.run(down, check=True, env=environ, stdout=subprocess.DEVNULL)


def write_result(name: str, figures: dict[str, object], *, case: str = "") -> Path:
    """Write the figures of a benchmark, or of one case of it, with when, where and how they were measured."""
    document = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{case and f'_{case}'}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def free_block(count: int) -> int:
    """The first of `count` consecutive ports that are free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            held = []
            for port in range(first, first + count):
                one = socket.socket()
                held.append(one)
                one.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
