"""How a fleet looks in a terminal: tables for `status` and for `top`."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trireme.cli.failing import FAILURE
from trireme.cli.fleet_report import FleetReport, ServiceReport, WorkerReport, report
from trireme.cli.run_directory import RunDirectory
from trireme.cli.tls_directory import speak_as_fleet

GOOD = {"SERVING", "ready", "up"}


def show_status(run_dir: Path, *, as_json: bool) -> None:
    """Print one look at the fleet.

    Raises:
        ServiceUnavailable: none runs in `run_dir`.
    """
    run_directory = RunDirectory.at(run_dir)
    state = run_directory.running()
    speak_as_fleet(state.tls)
    seen = asyncio.run(report(state, run_directory))
    if as_json:
        print(json.dumps(asdict(seen), indent=2))
    else:
        console = wide_console()
        tables = (services_table(seen.services), "", workers_table(seen.workers))
        console.print(Group(heading(seen), "", *tables))
    if not is_well(seen):
        sys.exit(FAILURE)


def wide_console() -> Console:
    """Standard output; wide where it is no terminal, so that tables keep one line per row."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def is_well(seen: FleetReport) -> bool:
    """Whether the fleet is ready: all services serve and all groups have their workers."""
    return (
        seen.phase == "ready"
        and seen.bus == "answers"
        and all(service.health in GOOD for service in seen.services)
        and bool(seen.groups)
        and all(group.ready >= group.desired for group in seen.groups)
    )


def heading(seen: FleetReport) -> RenderableType:
    """Where it is, where to call it, and what waits."""
    groups = ", ".join(f"{group.group} {group.ready}/{group.desired}" for group in seen.groups)
    lines = [
        f"fleet {seen.fleet} in {seen.run_dir}: {seen.phase}",
        "HTTP " + ", ".join(f"{seen.http_scheme}://{address}/v1" for address in seen.http),
        "gRPC " + ", ".join(seen.grpc),
        f"bus {seen.bus}; {seen.waiting_requests} requests wait for a worker; workers ready: {groups or '?'}",
    ]
    return Text("\n".join(lines))


def services_table(services: list[ServiceReport]) -> Table:
    """One row per service process."""
    shown = table("service", "pid", "health", "gRPC", "restarts", "last exit")
    for service in services:
        shown.add_row(
            service.name,
            str(service.pid or "-"),
            _coloured(service.health),
            service.grpc_address,
            str(service.restarts),
            service.last_exit,
        )
    return shown


def workers_table(workers: list[WorkerReport]) -> Table:
    """One row per worker and variant."""
    shown = table("worker", "id", "pid", "phase", "variant", "run", "wait", "KV", "tok/s", "deaths")
    for worker in workers:
        own = (worker.name, worker.worker_id, str(worker.pid or "-"), _coloured(worker.phase))
        deaths = str(worker.restarts) + (f" ({worker.last_exit})" if worker.restarts else "")
        if not worker.variants:
            shown.add_row(*own, "", "", "", "", "", deaths)
        for row, variant in enumerate(worker.variants):
            shown.add_row(
                *(own if row == 0 else ("", "", "", "")),
                variant.variant if variant.ready else f"{variant.variant} (loading)",
                str(variant.running),
                str(variant.waiting),
                f"{variant.kv_usage:.0%}",
                f"{variant.decode_tokens_per_s:.0f}" if variant.decode_tokens_per_s else "",
                deaths if row == 0 else "",
            )
    return shown


def table(*columns: str) -> Table:
    """A plain table with a bold header."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, no_wrap=column not in ("deaths", "last exit"))
    return shown


def _coloured(word: str) -> Text:
    return Text(word, style="green" if word in GOOD else "red" if "crash" in word else "yellow")
