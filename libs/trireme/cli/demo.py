"""`trireme demo`: the whole fleet at work in half a minute, then one table, then nothing left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trireme.cli.failing import failing_clearly

if TYPE_CHECKING:
    from rich.console import Console

    from trireme.cli.live_streams import LiveStreams
    from trireme.cli.run_directory import FleetState
    from trireme.load.drivers import Driver
    from trireme.load.report import Report

MODEL = "trireme-py"
STREAMS = 16
KILL_AFTER_TOKENS = 8 * STREAMS
TURNS = (
    "Complete this code:\ndef read_lines(path):\n",
    "Now write a class that counts words:\nclass WordCounter:\n",
    "And a test for it:\nclass TestWordCounter(unittest.TestCase):\n",
)
PROMPTS = (
    "import os\nimport sys\n\ndef main(argv):\n",
    "class Stack:\n    def __init__(self):\n",
    "def fibonacci(n):\n",
    "def parse_args(argv=None):\n    parser = argparse.ArgumentParser(",
    "class Node:\n    def __init__(self, value, next=None):\n",
    "def merge_sort(items):\n",
    "async def fetch(session, url):\n    async with session.get(url)",
    "with open(path, encoding='utf-8') as file:\n",
)
SHARED_PREFIX = (
    '"""Helpers shared by the whole package: paths, text, numbers and time."""\n\n'
    "from __future__ import annotations\n\n"
)
"""All streams begin with it, as applications begin with a system prompt."""


@failing_clearly
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Logs and data of the demo's fleet.")] = Path(
        ".run/demo"
    ),
    answer_tokens: Annotated[int, typer.Option(min=8, help="Tokens per answer.")] = 64,
) -> None:
    """Start a fleet, hold a conversation, run 16 streams by gRPC, by OpenAI's API and through a crash.

    Everything stays under the run directory; the fleet's ports are free ones, so a fleet that
    runs already is not disturbed.
    """
    from rich.console import Console

    from trireme.cli import starting, stopping

    console = Console(highlight=False)
    path = _demo_fleet(run_dir)
    started_s = time.monotonic()
    console.rule("[bold]Trireme: a fleet that serves language models")
    try:
        starting.start_detached(path, run_dir, timeout_s=120.0)
        failed = asyncio.run(_show(console, run_dir, answer_tokens))
    finally:
        stopping.stop_fleet(run_dir, timeout_s=30.0)
    console.print(f"done in {time.monotonic() - started_s:.1f} s; logs are in {run_dir}/logs")
    if failed:
        raise typer.Exit(1)


def _demo_fleet(run_dir: Path) -> Path:
    """The built-in fleet with two gateways, on free ports."""
    import yaml

    from trireme.cli.up import DEFAULT_FLEET
    from trireme.runtime.fleet import load_fleet

    shutil.rmtree(run_dir / "data", ignore_errors=True)
    fleet = load_fleet(DEFAULT_FLEET)
    http, grpc, operator = _free_ports(3)
    gateway = fleet.gateway.model_copy(
        update={
            "http": f"127.0.0.1:{http}",
            "grpc": f"127.0.0.1:{grpc}",
            "operator": f"127.0.0.1:{operator}",
            "replicas": 1,
        }
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "fleet.yaml"
    document = fleet.model_copy(update={"gateway": gateway}).model_dump(mode="json")
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


async def _show(console: Console, run_dir: Path, answer_tokens: int) -> int:
    """All parts of the demo against the running fleet; returns how many requests failed."""
    from trireme.cli.live_streams import LiveStreams
    from trireme.cli.run_directory import RunDirectory
    from trireme.load import drivers

    state = RunDirectory.at(run_dir).read()
    assert state is not None, "a ready fleet has a state file"
    reports: dict[str, Report] = {}
    console.rule("a conversation", align="left")
    reports["conversation"] = await _converse(console, state.grpc, answer_tokens)
    show = LiveStreams(console, answer_tokens)

    def by_grpc() -> AbstractAsyncContextManager[Driver]:
        return drivers.grpc_driver(state.grpc, model=MODEL, temperature=0.7, watch=show.add)

    def by_openai() -> AbstractAsyncContextManager[Driver]:
        return drivers.openai_driver(
            f"http://{state.http[0]}/v1", model=MODEL, temperature=0.7, watch=show.add
        )

    reports[f"{STREAMS} × gRPC"] = await _streams(show, f"{STREAMS} streams by gRPC", by_grpc())
    reports[f"{STREAMS} × OpenAI"] = await _streams(show, f"{STREAMS} streams by the OpenAI API", by_openai())
    reports["worker killed"] = await _streams(
        show,
        f"{STREAMS} streams by gRPC; one of the two workers is killed while it answers",
        by_grpc(),
        disturb=lambda: _kill_worker(state),
    )
    _table(console, reports)
    return sum(report.failed for report in reports.values())


async def _converse(console: Console, addresses: Sequence[str], answer_tokens: int) -> Report:
    """Three turns of one session; each brings the whole history, whose KV is found in the cache."""
    from trireme.client import Delta, Sampling, Summary, TriremeClient
    from trireme.load.outcome import Outcome
    from trireme.load.report import summarise
    from trireme.load.run import Run

    messages: list[dict[str, str]] = []
    outcomes = []
    began_s = time.monotonic()
    async with TriremeClient(list(addresses)) as client:
        for turn, text in enumerate(TURNS):
            console.print(f"[bold]you[/]  {text.strip()}")
            messages.append({"role": "user", "content": text})
            outcome = Outcome(index=turn, started_s=time.monotonic())
            console.print("[bold]it[/]   ", end="")
            sampling = Sampling(max_tokens=answer_tokens, temperature=0.0)
            async for event in client.generate(MODEL, messages, sampling, session_id="demo"):
                if isinstance(event, Delta):
                    outcome.arrivals.append((time.monotonic(), len(event.token_ids)))
                    outcome.text += event.text
                    console.print(event.text, end="", markup=False, soft_wrap=True)
                elif isinstance(event, Summary):
                    outcome.note_usage(event.usage)
            outcome.ended_s = time.monotonic()
            outcomes.append(outcome)
            messages.append({"role": "assistant", "content": outcome.text})
            share = outcome.cached_tokens / max(1, outcome.prompt_tokens)
            console.print(
                f"\n     [dim]{outcome.prompt_tokens} prompt tokens, {share:.0%} of them from the cache; "
                f"first token after {1000 * (outcome.ttft_s or 0):.0f} ms[/]"
            )
    return summarise(Run(outcomes=tuple(outcomes), duration_s=time.monotonic() - began_s))


async def _streams(
    show: LiveStreams,
    title: str,
    opened: AbstractAsyncContextManager[Driver],
    *,
    disturb: Callable[[], Awaitable[None]] | None = None,
) -> Report:
    """All streams at once, shown while they run."""
    from trireme.load.plan import PlannedRequest
    from trireme.load.report import summarise
    from trireme.load.run import run_closed_loop

    plan = [
        PlannedRequest(
            index=index,
            at_s=0.0,
            prompt=SHARED_PREFIX + PROMPTS[index % len(PROMPTS)],
            max_tokens=show.answer_tokens,
        )
        for index in range(STREAMS)
    ]
    async with opened as driver, asyncio.TaskGroup() as tasks:
        with show.running(title, total=len(plan)):
            if disturb is not None:
                tasks.create_task(_when_under_way(show, disturb))
            run = await run_closed_loop(plan, driver, concurrency=STREAMS)
    return summarise(run)


async def _when_under_way(show: LiveStreams, action: Callable[[], Awaitable[None]]) -> None:
    while show.tokens() < KILL_AFTER_TOKENS:
        await asyncio.sleep(0.005)
    await action()


async def _kill_worker(state: FleetState) -> None:
    """kill -9 one living worker."""
    from trireme.bus.connection import Keys, open_redis
    from trireme.bus.registry import Registry

    async with open_redis(state.redis_url) as redis:
        workers = await Registry(redis, Keys(state.bus_prefix)).living("worker")
    os.kill(workers[0].pid, signal.SIGKILL)


def _table(console: Console, reports: dict[str, Report]) -> None:
    from rich.table import Table

    table = Table(title="what came of it", title_justify="left")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Report], str]] = {
        "requests": lambda r: f"{r.requests}",
        "failed": lambda r: f"{r.failed}",
        "paused by the fault": lambda r: f"{r.pauses}",
        "TTFT p50": lambda r: f"{r.ttft_ms.p50:.1f} ms",
        "TPOT p50": lambda r: f"{r.tpot_ms.p50:.2f} ms",
        "tokens/s": lambda r: f"{r.output_throughput:.0f}",
        "prefix-cache hits": lambda r: f"{r.cached_prompt_tokens / max(1, r.prompt_tokens):.0%}",
        "joules / 1k tokens": lambda r: f"{r.joules_per_1k_tokens:.2f}",
        "gCO2e / 1k tokens": lambda r: f"{r.grams_co2e_per_1k_tokens:.5f}",
    }
    for title, read in rows.items():
        table.add_row(title, *(read(report) for report in reports.values()))
    console.print(table)
    console.print("TTFT: time to first token. TPOT: time per output token after it.")
    console.print("Energy is attributed by the rule in docs/energy.md.")
