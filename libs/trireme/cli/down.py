"""`trireme down`: stop the fleet of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def down(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds for running requests to end.")
    ] = 120.0,
) -> None:
    """Stop the fleet in order, and make sure that nothing of it is left.

    Running it twice does no harm. Accepted requests that had not ended stay on the bus and go
    on at the next `trireme up` with the same run directory.

    Example:

        trireme down
    """
    from trireme.cli import stopping

    stopping.stop_fleet(run_dir, timeout_s=timeout)
