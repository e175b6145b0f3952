"""`trireme top`: the running fleet, live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def top(
    period: Annotated[float, typer.Option("--period", min=0.2, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option("--count", min=0, help="Looks before it ends; 0: until Ctrl-C.")] = 0,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Watch workers, queues, KV tiers and power until Ctrl-C.

    Example:

        trireme top --period 0.5
    """
    from trireme.cli import watching

    watching.watch_fleet(run_dir, period_s=period, count=count)
