"""Ask a scheduler for its decisions about a request, and lay them out."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from google.protobuf import json_format
from rich.console import Console

from trireme.cli.fleet_report import living_processes
from trireme.cli.run_directory import RunDirectory
from trireme.cli.showing import table, wide_console
from trireme.cli.tls_directory import speak_as_fleet
from trireme.errors import ServiceUnavailable
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import Decision
from trireme.wire.scheduler.v1 import scheduler_pb2 as pb
from trireme.wire.scheduler.v1.scheduler_pb2_grpc import SchedulerStub

CALL_TIMEOUT_S = 5.0


def explain_request(request_id: str, run_dir: Path, *, as_json: bool) -> None:
    """Print the decisions, oldest first.

    Raises:
        ServiceUnavailable: no fleet runs, or no scheduler lives.
        grpc.RpcError: the scheduler knows no such request.
    """
    answer = asyncio.run(_ask(request_id, RunDirectory.at(run_dir)))
    if as_json:
        print(json_format.MessageToJson(answer, preserving_proto_field_name=True))
        return
    console = wide_console()
    for decision in answer.decisions:
        _show(decision, console)


async def _ask(request_id: str, run_directory: RunDirectory) -> pb.ExplainResponse:
    state = run_directory.running()
    speak_as_fleet(state.tls)
    records = await living_processes(state)
    address = next((record.grpc_address for record in records if record.service == "scheduler"), "")
    if not address:
        raise ServiceUnavailable("no scheduler lives: see `trireme status`, then try again")
    async with open_channel(address) as channel:
        request = pb.ExplainRequest(request_id=request_id)
        response: pb.ExplainResponse = await SchedulerStub(channel).Explain(request, timeout=CALL_TIMEOUT_S)
        return response


def _show(decision: Decision, console: Console) -> None:
    at = time.strftime("%H:%M:%S", time.localtime(decision.decided_unix_s))
    console.print(
        f"attempt {decision.attempt} at {at} by {decision.scheduler_id}: "
        f"{decision.variant} at {decision.worker_id}\n  {decision.reason}",
        markup=False,
    )
    shown = table("worker", "variant", "finish s", "queue s", "prefill s", "decode s", "cached tokens")
    for candidate in decision.candidates:
        seconds = (candidate.finish_s, candidate.queue_s, candidate.prefill_s, candidate.decode_s)
        shown.add_row(
            candidate.worker_id,
            candidate.variant,
            *(f"{value:.3f}" for value in seconds),
            str(candidate.cached_tokens),
        )
    console.print(shown)
