"""`trireme bench`: load on a fleet, or on any OpenAI-compatible server, and the figures of it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trireme.cli.failing import failing_clearly
from trireme.errors import InvalidConfiguration

if TYPE_CHECKING:
    from trireme.load.drivers import Driver
    from trireme.load.plan import PlannedRequest
    from trireme.load.report import Report
    from trireme.load.run import Run


class Api(StrEnum):
    """Which door of the fleet is used."""

    GRPC = "grpc"
    OPENAI = "openai"


@failing_clearly
def bench(
    model: Annotated[str, typer.Option(help="Model or variant to ask.")] = "trireme-py",
    api: Annotated[Api, typer.Option(help="grpc, or openai for /v1/completions.")] = Api.GRPC,
    address: Annotated[
        list[str] | None, typer.Option(help="gRPC host:port, repeatable; or the base URL that ends in /v1.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: keep so many in flight.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: Poisson arrivals per second.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: replay an Azure CSV or a Mooncake JSON-lines trace.")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Trace seconds per wall second.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Factor on the trace's token counts.")] = 1.0,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` or `turns`.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Synthetic prompts: mean length.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Answer length.")] = 32,
    spread: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lengths vary by +- this share.")] = 0.0,
    tenants: Annotated[int, typer.Option(min=1, help="Spread requests over so many tenants.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    honour_eos: Annotated[bool, typer.Option(help="Let answers end early.")] = False,
    ttft_ms: Annotated[float | None, typer.Option(help="Goal for goodput.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Goal for goodput.")] = None,
    e2e_ms: Annotated[float | None, typer.Option(help="Goal for goodput.")] = None,
    vocabulary: Annotated[int, typer.Option(min=2, help="Synthetic token ids stay below this.")] = 4096,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Without --address: the fleet's run directory.")
    ] = Path(".run"),
) -> None:
    """Measure TTFT, TPOT, ITL, e2e, goodput, throughput and energy.

    Open loop (--rate, --trace) or closed loop (--concurrency; 8 if none of the three is given).

        trireme bench --concurrency 16 --requests 200
        trireme bench --rate 5 --ttft-ms 200 --tpot-ms 30
        trireme bench --trace benchmarks/data/traces/azure2023_conv_10min.csv --length-scale 0.1
    """
    if sum(choice is not None for choice in (concurrency, rate, trace)) > 1:
        raise InvalidConfiguration("choose one of --concurrency, --rate and --trace", param="--rate")

    from trireme.cli.connecting import gateway_addresses, openai_base_url
    from trireme.load import drivers, plan, report

    lengths = plan.Lengths(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, spread=spread)
    planned: list[PlannedRequest]
    if trace is not None:
        planned = plan.from_trace(
            trace,
            limit=requests,
            time_scale=time_scale,
            length_scale=length_scale,
            vocabulary=vocabulary,
            seed=seed,
        )
    elif prompts is not None:
        planned = plan.from_prompts(
            prompts, count=requests, rate_rps=rate, answer_tokens=answer_tokens, seed=seed
        )
    elif rate is not None:
        planned = plan.poisson(
            count=requests,
            rate_rps=rate,
            lengths=lengths,
            vocabulary=vocabulary,
            seed=seed,
            tenants=tenants,
        )
    else:
        planned = plan.closed(
            count=requests, lengths=lengths, vocabulary=vocabulary, seed=seed, tenants=tenants
        )
    opened: AbstractAsyncContextManager[Driver]
    if api is Api.GRPC:
        opened = drivers.grpc_driver(
            gateway_addresses(address or (), run_dir),
            model=model,
            temperature=temperature,
            ignore_eos=not honour_eos,
        )
    else:
        opened = drivers.openai_driver(
            openai_base_url(address or (), run_dir),
            model=model,
            temperature=temperature,
            ignore_eos=not honour_eos,
        )
    in_flight = None if rate is not None or trace is not None else concurrency or 8
    finished = asyncio.run(_run(opened, planned, in_flight))
    figures = report.summarise(finished, report.Goals(ttft_ms=ttft_ms, tpot_ms=tpot_ms, e2e_ms=e2e_ms))
    _show(figures)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        document = {"seed": seed, "model": model, "api": api.value, **figures.as_json()}
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"written to {output}")
    if figures.failed == figures.requests:
        raise typer.Exit(1)


async def _run(
    opened: AbstractAsyncContextManager[Driver], planned: list[PlannedRequest], in_flight: int | None
) -> Run:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from trireme.load import run

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(planned))
        async with opened as driver:
            if in_flight is None:
                return await run.run_open_loop(planned, driver, on_end=lambda _: progress.advance(task))
            return await run.run_closed_loop(
                planned, driver, concurrency=in_flight, on_end=lambda _: progress.advance(task)
            )


def _show(figures: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    times = Table(title="milliseconds", title_justify="left")
    times.add_column("")
    for column in ("mean", "p50", "p90", "p95", "p99", "max"):
        times.add_column(column, justify="right")
    for name, row in (
        ("TTFT", figures.ttft_ms),
        ("TPOT", figures.tpot_ms),
        ("ITL", figures.itl_ms),
        ("e2e", figures.e2e_ms),
    ):
        values = (row.mean, row.p50, row.p90, row.p95, row.p99, row.max)
        times.add_row(name, *(f"{value:.2f}" for value in values))
    console.print(times)
    failed = f", {figures.failed} failed {dict(figures.errors)}" if figures.failed else ""
    console.print(f"{figures.requests} requests{failed} in {figures.duration_s:.2f} s")
    console.print(
        f"{figures.request_throughput:.2f} requests/s, goodput {figures.goodput:.2f} requests/s, "
        f"{figures.output_throughput:.1f} answer tokens/s, {figures.total_token_throughput:.1f} tokens/s"
    )
    share = figures.cached_prompt_tokens / max(1, figures.prompt_tokens)
    console.print(
        f"{figures.prompt_tokens} prompt tokens ({share:.0%} from cache), "
        f"{figures.answer_tokens} answer tokens"
    )
    console.print(
        f"{figures.joules:.1f} J: {figures.joules_per_token:.4f} J/token, "
        f"{figures.joules_per_1k_tokens:.2f} J and {figures.grams_co2e_per_1k_tokens:.5f} gCO2e per 1k tokens"
    )
