"""Ask placement for more or fewer workers, and wait until they are there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from rich.console import Console

from trireme.cli.fleet_report import living_processes
from trireme.cli.placement_client import CALL_TIMEOUT_S, placement
from trireme.cli.run_directory import RunDirectory
from trireme.cli.tls_directory import speak_as_fleet
from trireme.errors import InvalidConfiguration, RequestConflict, ServiceUnavailable
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb


def parse_target(text: str) -> tuple[str, int]:
    """`worker=3` as (group, replicas).

    Raises:
        InvalidConfiguration: it is not of that form.
    """
    group, _, count = text.partition("=")
    if not group or not count.isdigit():
        raise InvalidConfiguration(f"{text!r} is not GROUP=REPLICAS: write, say, worker=3", param="targets")
    return group, int(count)


def scale_fleet(targets: list[str], run_dir: Path, *, wait_s: float, address: str = "") -> None:
    """Scale each group; returns when the workers are there.

    Args:
        targets: as `parse_target` takes them.
        run_dir: of this machine's fleet.
        wait_s: how long to wait for the workers; 0: not at all.
        address: host:port of a placement service elsewhere; empty: this machine's.

    Raises:
        InvalidConfiguration: a target is malformed.
        RequestConflict: someone else scales a group.
        ServiceUnavailable: no fleet runs, or the workers were not there in time.
    """
    wanted = dict(parse_target(text) for text in targets)
    asyncio.run(_scale(wanted, RunDirectory.at(run_dir), wait_s=wait_s, address=address))


async def _scale(wanted: dict[str, int], run_directory: RunDirectory, *, wait_s: float, address: str) -> None:
    console = Console(highlight=False)
    if address:
        records = [ProcessRecord(service="placement", grpc_address=address)]
    else:
        fleet = run_directory.running()
        speak_as_fleet(fleet.tls)
        records = await living_processes(fleet)
    async with placement(records) as stub:
        for name, replicas in wanted.items():
            request = pb.ScaleRequest(group=name, replicas=replicas)
            answer = await stub.Scale(request, timeout=CALL_TIMEOUT_S)
            console.print(f"{name}: {answer.previous_replicas} -> {replicas}")
        deadline_s = time.monotonic() + wait_s
        with console.status("waiting for the workers") as status:
            while wait_s > 0:
                state = await stub.GetState(pb.GetStateRequest(), timeout=CALL_TIMEOUT_S)
                asked = [group for group in state.groups if group.group in wanted]
                for group in asked:
                    if group.left_because:
                        raise RequestConflict(f"{group.group} is left as it is: {group.left_because}")
                late = [_progress(group, state) for group in asked if not _is_done(group, state)]
                if not late:
                    return
                status.update("; ".join(late))
                if time.monotonic() > deadline_s:
                    raise ServiceUnavailable(f"not done after {wait_s:.0f} s: {'; '.join(late)}")
                await asyncio.sleep(0.2)


def _living(group: pb.GroupState, state: pb.GetStateResponse) -> int:
    return sum(worker.pid > 0 and worker.group == group.group for worker in state.workers)


def _is_done(group: pb.GroupState, state: pb.GetStateResponse) -> bool:
    return group.ready_replicas == group.desired_replicas == _living(group, state)


def _progress(group: pb.GroupState, state: pb.GetStateResponse) -> str:
    ready, living = group.ready_replicas, _living(group, state)
    return f"{group.group}: {ready} ready of {living} living, {group.desired_replicas} wanted"
