"""`trireme tls`: certificates for fleets whose owner has no authority of their own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly
from trireme.errors import InvalidConfiguration

tls = typer.Typer(
    name="tls",
    help="Make and renew the certificates of a fleet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the files are.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address under which clients reach gateways; repeatable."),
]
Days = Annotated[int, typer.Option(min=1, max=825, help="How long the certificates are valid.")]


@tls.command()
@failing_clearly
def new(directory: Directory, host: Hosts = None, days: Days = 365) -> None:
    """Make an authority for gateways and clients, one for services, and their certificates.

    This machine's own names need no --host. Name the directory in fleet.yaml: `tls: {directory: DIRECTORY}`.

    Example:

        trireme tls new tls --host gpu7.example.com
    """
    _certificates().make(directory, host or (), days=days)
    print(f"clients believe {directory / 'ca.crt'}")


@tls.command()
@failing_clearly
def renew(directory: Directory, host: Hosts = None, days: Days = 365) -> None:
    """Make new certificates of the authorities in the directory. A fleet that runs takes them up by itself.

    Without --host the gateways' names stay.

    Example:

        trireme tls renew tls
    """
    _certificates().renew(directory, host or (), days=days)
    print(f"new certificates are in {directory}")


def _certificates() -> ModuleType:
    try:
        from trireme.cli import certificates
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(
            f"certificates are made with {error.name}, which is not installed: "
            "pip install 'trireme[certificates]'"
        ) from error
    return certificates
