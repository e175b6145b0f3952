"""`trireme up`: run the fleet on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly

DEFAULT_FLEET = Path(__file__).with_name("default_fleet.yaml")


def chosen_fleet(config: Path | None) -> Path:
    """The file that was named, or `fleet.yaml` here, or the one in the package."""
    if config is not None:
        return config.absolute()
    here = Path("fleet.yaml").absolute()
    return here if here.is_file() else DEFAULT_FLEET


@failing_clearly
def up(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Fleet file. Default: fleet.yaml here, or else the small built-in fleet."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the fleet is ready and leave it running.")
    ] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Logs, data and state of this fleet.")] = Path(
        ".run"
    ),
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds for the fleet to become ready.")
    ] = 300.0,
) -> None:
    """Start Redis and the six services, and keep them running.

    Without --detach it stays in the foreground; Ctrl-C stops everything in order.

    Examples:

        trireme up                       the small built-in fleet

        trireme up -c my-fleet.yaml -d   your own, in the background
    """
    from trireme.cli import starting

    path = chosen_fleet(config)
    if detach:
        starting.start_detached(path, run_dir, timeout_s=timeout)
    else:
        starting.run_in_foreground(path, run_dir, timeout_s=timeout)
