"""`trireme scale`: change how many workers a group has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def scale(
    targets: Annotated[list[str], typer.Argument(metavar="GROUP=REPLICAS...", help="As in worker=3.")],
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
    wait: Annotated[
        float, typer.Option("--wait", min=0.0, help="Seconds to wait until it is so; 0: do not wait.")
    ] = 60.0,
    placement: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="A placement service on a cluster, not this machine's.")
    ] = "",
) -> None:
    """Change how many workers a group has, until the fleet is stopped.

    Workers that are too many finish their requests before they end.

    Examples:

        trireme scale worker=3

        trireme scale small=4 large=1 --wait 0

        trireme scale worker=3 --placement 10.1.2.3:7060
    """
    from trireme.cli import scaling

    scaling.scale_fleet(targets, run_dir, wait_s=wait, address=placement)
