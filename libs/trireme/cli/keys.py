"""`trireme keys`: API keys, made and withdrawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly

keys = typer.Typer(
    name="keys",
    help="Make and withdraw the API keys of tenants.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@keys.command()
@failing_clearly
def new(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    key_id: Annotated[
        str | None, typer.Option("--id", help="The key's name in the audit log; drawn if absent.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Keys file to add it to; made if absent. Comments in it are lost.")
    ] = None,
) -> None:
    """Make a key and show it, this once: only its SHA-256 is kept.

    Gateways take the change within two seconds. Without --file the entry to add is printed.

    Example:

        trireme keys new --tenant acme --file keys.yaml
    """
    import sys

    from trireme.cli.key_files import add_key, entry_text

    if file is None:
        key, text = entry_text(tenant, key_id)
        print(text, file=sys.stderr)
    else:
        key = add_key(file, tenant, key_id)
    print(key)


@keys.command()
@failing_clearly
def withdraw(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's name.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="The keys file. Comments in it are lost.")],
) -> None:
    """Take a key out of the file: calls with it are refused within two seconds.

    Example:

        trireme keys withdraw acme-3f9c --tenant acme --file keys.yaml
    """
    from trireme.cli.key_files import remove_key

    remove_key(file, tenant, key_id)
