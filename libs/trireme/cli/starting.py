"""The two ways to run a fleet: in this terminal, or detached from it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from trireme.cli.failing import FAILURE, fail
from trireme.cli.fleet_processes import check_checkpoints, check_credentials, check_ports
from trireme.cli.fleet_runner import run_fleet
from trireme.cli.run_directory import MARK, AlreadyRunning, FleetState, RunDirectory
from trireme.runtime.child_processes import last_lines
from trireme.runtime.fleet import Fleet, load_fleet


def run_in_foreground(path: Path, run_dir: Path, *, timeout_s: float) -> None:
    """Run the fleet until Ctrl-C or SIGTERM.

    Raises:
        InvalidConfiguration: the fleet file, a port or a checkpoint is wrong.
        AlreadyRunning: the run directory is in use.
        ServiceUnavailable: the fleet did not become ready.
    """
    console = Console(highlight=False, soft_wrap=True)
    run_directory = RunDirectory.at(run_dir)
    fleet = _checked(path, run_directory)
    console.print(f"starting the fleet of {path}")

    def say(line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)

    def on_ready(state: FleetState) -> None:
        show_ready(state, console)
        console.print("Ctrl-C stops it.")

    asyncio.run(run_fleet(fleet, path, run_directory, ready_timeout_s=timeout_s, say=say, on_ready=on_ready))
    console.print("stopped")


def start_detached(path: Path, run_dir: Path, *, timeout_s: float) -> None:
    """Start a supervisor of its own session; returns when the fleet is ready. Errors as above."""
    console = Console(highlight=False, soft_wrap=True)
    run_directory = RunDirectory.at(run_dir)
    run_directory.create()
    _checked(path, run_directory)
    log_path = run_directory.log_of("supervisor")
    words = [sys.executable, "-m", "trireme.cli", "up", "--config", str(path)]
    words += ["--run-dir", str(run_directory.path), "--timeout", str(timeout_s)]
    with log_path.open("wb") as log_file:
        supervisor = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, MARK: str(run_directory.path)},
        )
    try:
        state = _wait_until_ready(supervisor, run_directory, console)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    if state is None or state.phase != "ready":
        supervisor.wait()
        why = state.error if state is not None else ""
        if not why:
            why = (last_lines(log_path, count=1) or [f"ended without a word in {log_path}"])[0]
        fail(why.removeprefix("trireme: "), status=supervisor.returncode or FAILURE)
    show_ready(state, console)
    console.print("running in the background; `trireme down` stops it")


def _wait_until_ready(
    supervisor: subprocess.Popen[bytes], run_directory: RunDirectory, console: Console
) -> FleetState | None:
    """Follow the state file until the start has ended one way or the other."""
    with console.status("starting") as status:
        while True:
            ended = supervisor.poll() is not None
            state = run_directory.read()
            if state is not None and state.supervisor_pid != supervisor.pid:
                state = None  # of an earlier run
            if ended or (state is not None and state.phase not in ("starting", "failed")):
                return state
            if state is not None and state.waiting_for:
                status.update(f"waiting for {state.waiting_for}")
            time.sleep(0.1)


def _checked(path: Path, run_directory: RunDirectory) -> Fleet:
    fleet = load_fleet(path)
    state = run_directory.read()
    if state is not None and state.supervisor_lives:
        raise AlreadyRunning(
            f"a fleet runs already in {run_directory.path}: stop it with `trireme down`, "
            "or choose another directory with --run-dir"
        )
    left = [found for found in run_directory.processes() if found.pid != os.getppid()]
    if left:
        raise AlreadyRunning(
            f"{len(left)} processes of an earlier fleet still run in {run_directory.path}: "
            "stop them with `trireme down`"
        )
    check_ports(fleet, path)
    check_checkpoints(fleet, path)
    check_credentials(fleet, path)
    return fleet


def show_ready(state: FleetState, console: Console) -> None:
    """Print how long each part took, and where to call."""
    for phase in state.timeline:
        console.print(f"  {phase.seconds:7.2f} s  {phase.name}")
    for address in state.http:
        console.print(f"HTTP  {state.http_scheme}://{address}/v1")
    for address in state.grpc:
        console.print(f"gRPC  {address}")
    if state.operator:
        console.print(f"page  {state.http_scheme}://{state.operator}/ for operators")
