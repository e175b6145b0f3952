"""`trireme status`: what runs, where, and how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Show addresses, services, workers, variants and queues.

    Exit status 0: the fleet is ready; 1: it is not, or none runs.

    Examples:

        trireme status

        trireme status --json | jq .workers
    """
    from trireme.cli import showing

    showing.show_status(run_dir, as_json=as_json)
