"""`trireme doctor`: what is wrong with a fleet, likely cause first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def doctor(
    bundle: Annotated[
        Path | None,
        typer.Option(help="Also write what was found to this .tar.gz, without secrets and texts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
    redis_url: Annotated[
        str, typer.Option(envvar="TRIREME_REDIS_URL", help="A fleet elsewhere: its Redis.")
    ] = "",
    bus_prefix: Annotated[
        str, typer.Option(envvar="TRIREME_BUS_PREFIX", help="A fleet elsewhere: prefix of its keys.")
    ] = "trireme",
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Ask all processes of a fleet, however many still answer, and explain what is wrong.

    Exit status 0: nothing is; 1: something is.

    Examples:

        trireme doctor

        trireme doctor --bundle fleet.tar.gz
    """
    from trireme.cli.doctoring import telling

    telling.tell(run_dir, redis_url=redis_url, bus_prefix=bus_prefix, bundle=bundle, as_json=as_json)
