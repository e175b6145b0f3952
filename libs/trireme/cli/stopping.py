"""Stop a fleet, whatever state it is in: running, half started, or orphaned by a killed supervisor."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from pathlib import Path

from rich.console import Console

from trireme.cli.run_directory import FleetState, RunDirectory
from trireme.cli.supervisor import stop_processes
from trireme.errors import InvalidConfiguration, ServiceUnavailable
from trireme.kvcache.arena import SHARED_MEMORY, remove_stale_arenas
from trireme.runtime.child_processes import ProcessIdentity, is_alive, send_signal


def stop_fleet(run_dir: Path, *, timeout_s: float) -> None:
    """Returns when no process of the fleet lives.

    Raises:
        ServiceUnavailable: a process cannot be stopped.
    """
    console = Console(highlight=False, soft_wrap=True)
    run_directory = RunDirectory.at(run_dir)
    try:
        state = run_directory.read()
    except InvalidConfiguration as error:
        # The processes carry the directory's mark, so they are found without it.
        console.print(f"{error.message.partition(':')[0]}: set aside")
        run_directory.state_file.replace(run_directory.state_file.with_suffix(".json.damaged"))
        state = None
    supervised = state is not None and state.supervisor_lives
    if state is not None and supervised:
        _stop_supervisor(state, timeout_s, console)
    orphans = asyncio.run(_stop_orphans(run_directory, state, console))
    if SHARED_MEMORY.is_dir():
        remove_stale_arenas(SHARED_MEMORY)
    left = run_directory.processes()
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise ServiceUnavailable(f"these processes cannot be stopped: {pids}")
    if not supervised and not orphans:
        console.print(f"no fleet runs in {run_directory.path}")
        return
    after = run_directory.read()
    if after is not None and after.phase not in ("stopped", "failed"):
        run_directory.write(dataclasses.replace(after, phase="stopped"))
    console.print("stopped" + (f"; {orphans} processes had no supervisor any more" if orphans else ""))


def _stop_supervisor(state: FleetState, timeout_s: float, console: Console) -> None:
    send_signal(state.supervisor, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout_s
    with console.status("stopping"):
        while is_alive(state.supervisor):
            if time.monotonic() > deadline_s:
                console.print(f"the supervisor did not end in {timeout_s:.0f} s: killed")
                send_signal(state.supervisor, signal.SIGKILL)
                deadline_s += timeout_s
            time.sleep(0.05)


async def _stop_orphans(run_directory: RunDirectory, state: FleetState | None, console: Console) -> int:
    """Stop what has no supervisor: first all but Redis, so that they can still say goodbye."""
    bus = {process.pid for process in (state.processes if state else ()) if process.service == "redis"}

    def but_redis() -> list[ProcessIdentity]:
        return [process for process in run_directory.processes() if process.pid not in bus]

    stopped = await stop_processes(but_redis, say=console.print)
    return stopped + await stop_processes(run_directory.processes, say=console.print)
