"""`trireme simulate`: a trace on a modelled fleet under the live policies, and a report of it."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trireme.cli.failing import failing_clearly
from trireme.errors import InvalidConfiguration
from trireme.policies.mlfq import MlfqSettings

if TYPE_CHECKING:
    from trireme.simulator.result import Result


class SwappingChoice(StrEnum):
    """What happens to the KV of a sequence that must make room."""

    PROACTIVE = "proactive"
    REACTIVE = "reactive"
    RECOMPUTE = "recompute"


class LevelChoice(StrEnum):
    """Where the levels of mlfq lie."""

    DOUBLING = "doubling"
    DEMAND = "demand"


@failing_clearly
def simulate(
    trace: Annotated[
        str,
        typer.Option(
            help="azure-conv, azure-code, mooncake-conversation, agentic; sharegpt-like or alpaca-like "
            "(generated); or a file of one of these forms."
        ),
    ] = "azure-conv",
    policy: Annotated[str, typer.Option(help="fcfs, priority, mlfq, naive, fixed or srpt.")] = "mlfq",
    compare: Annotated[
        str,
        typer.Option(help="More policies on the same requests, comma-separated; the first is the baseline."),
    ] = "",
    profile: Annotated[
        str,
        typer.Option(
            help="A file of `python -m benchmarks.iteration_profile`, or a GPU such as a100-llama2-7b."
        ),
    ] = "a100-llama2-7b",
    requests: Annotated[int | None, typer.Option(min=1, help="How many; a trace's first ones.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second; a trace is stretched to it. Default: the trace's."),
    ] = None,
    cv: Annotated[
        float | None,
        typer.Option(
            help="Draw the gaps anew with this coefficient of variation; 1 is Poisson. Needs --rate."
        ),
    ] = None,
    prompt_factor: Annotated[float, typer.Option(help="Factor on prompt lengths.")] = 1.0,
    answer_factor: Annotated[float, typer.Option(help="Factor on answer lengths.")] = 1.0,
    sessions_per_s: Annotated[float, typer.Option(help="Starts of agentic sessions.")] = 0.1,
    closed: Annotated[
        bool, typer.Option("--closed", help="A session's next turn waits for the answer before it.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Equal workers, one engine each.")] = 1,
    queue_limit: Annotated[
        int | None,
        typer.Option(min=0, help="Requests a worker holds beyond its batch. Default: all that come."),
    ] = None,
    kv_blocks: Annotated[int, typer.Option(min=1, help="KV blocks of a worker's device.")] = 4096,
    host_blocks: Annotated[int, typer.Option(min=0, help="KV blocks of a worker's host memory.")] = 16384,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 16,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences per iteration.")] = 32,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens per iteration.")] = 2048,
    swapping: Annotated[
        SwappingChoice, typer.Option(help="Copy KV of preempted sequences ahead, on demand, or drop it.")
    ] = SwappingChoice.PROACTIVE,
    mlfq_levels: Annotated[
        LevelChoice, typer.Option(help="Quanta of mlfq, as in a fleet's file.")
    ] = LevelChoice.DOUBLING,
    dram_gb: Annotated[
        float, typer.Option(min=0, help="DRAM for KV that is found again; needs a trace with prefix blocks.")
    ] = 0.0,
    ssd_gb: Annotated[float, typer.Option(min=0, help="SSD below it.")] = 0.0,
    disk_gb_per_s: Annotated[float, typer.Option(help="Of the SSD, each direction.")] = 3.0,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("simulation"),
) -> None:
    """Simulate a fleet: SimPy's clock, modelled engines and links, the policies that the fleet runs.

    Writes report.html, three PNG files and figures.json, and prints the figures. Equal options give equal
    results.

        trireme simulate --trace azure-conv --rate 4 --compare fcfs,mlfq,srpt
        trireme simulate --trace sharegpt-like --requests 20000 --rate 8 --workers 2 --cv 4
        trireme simulate --trace mooncake-conversation --dram-gb 100 --ssd-gb 1000 --kv-blocks 8192
        trireme simulate --profile benchmarks/results/iteration_profile.json --answer-factor 0.2 --rate 1
    """
    try:
        import matplotlib  # noqa: F401
        import simpy  # noqa: F401
    except ImportError as error:
        raise InvalidConfiguration(
            f"the simulator needs {error.name}: install trireme[simulator]", param="simulate"
        ) from error

    from trireme.simulator import scenario
    from trireme.simulator.engine_config import EngineConfig, Swapping
    from trireme.simulator.fleet import FleetConfig
    from trireme.simulator.report import write_report

    names = scenario.policies_of(policy, compare)
    model = scenario.model_of(profile)
    workload = scenario.workload_of(
        scenario.WorkloadSpec(
            trace=trace,
            requests=requests,
            rate_rps=rate,
            cv=cv,
            prompt_factor=prompt_factor,
            answer_factor=answer_factor,
            sessions_per_s=sessions_per_s,
            is_closed=closed,
            seed=seed,
        )
    )
    config = FleetConfig(
        workers=workers,
        queue_limit=queue_limit,
        engine=EngineConfig(
            num_blocks=kv_blocks,
            host_blocks=host_blocks,
            block_tokens=block_tokens,
            max_sequences=max_sequences,
            token_budget=token_budget,
            swapping=Swapping(swapping.value),
        ),
    )
    settings = MlfqSettings(learns_quanta=mlfq_levels is LevelChoice.DEMAND)
    runs: dict[str, Result] = {}
    for name in names:
        started_s = time.perf_counter()
        reuse = scenario.tiers_of(
            workload, model, dram_gb=dram_gb, ssd_gb=ssd_gb, disk_gb_per_s=disk_gb_per_s
        )
        runs[name] = scenario.simulate(workload, config, model, name, settings=settings, reuse=reuse)
        seconds = time.perf_counter() - started_s
        typer.echo(
            f"{name}: {len(workload)} requests, {runs[name].makespan_s:,.0f} s simulated in {seconds:.1f} s "
            f"({len(workload) / seconds:,.0f} requests/s)",
            err=True,
        )
    facts = scenario.facts_of(workload, config, model, trace=trace, seed=seed)
    write_report(out, runs, title=f"{trace} on {model.name}", facts=facts)
    _show(runs)
    typer.echo(f"written to {out / 'report.html'}")


def _show(runs: dict[str, Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    from trireme.simulator.report import shown

    columns = (
        ("JCT mean", "jct_s_mean", "s"),
        ("JCT p99", "jct_s_p99", "s"),
        ("TTFT mean", "ttft_s_mean", "s"),
        ("TTFT p99", "ttft_s_p99", "s"),
        ("per token", "per_token_s_mean", "ms"),
        ("cached", "cached_token_share", "%"),
        ("tokens/s", "answer_tokens_per_s", ""),
    )
    table = Table()
    table.add_column("policy")
    for heading, _, unit in columns:
        table.add_column(f"{heading}\n{unit}", justify="right")
    for name, run in runs.items():
        figures = run.figures()
        table.add_row(name, *(shown(figures[key], unit) for _, key, unit in columns))
    Console().print(table)
