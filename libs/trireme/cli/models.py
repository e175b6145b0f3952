"""`trireme models`: what can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
    address: Annotated[
        list[str] | None, typer.Option(help="host:port of a gateway's gRPC server; repeatable.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """List models and their variants, and whether a worker serves them now.

    Example:

        trireme models
    """
    import json
    from dataclasses import asdict

    from trireme.cli.connecting import gateway_addresses
    from trireme.cli.showing import table, wide_console
    from trireme.client import SyncTriremeClient

    with SyncTriremeClient(gateway_addresses(address or (), run_dir), retry_s=5.0, timeout_s=5.0) as client:
        found = client.list_models()
    if as_json:
        print(json.dumps([asdict(model) for model in found], indent=2))
        return
    shown = table("name", "variant of", "ready", "context tokens", "vocabulary")
    for model in found:
        ready = "yes" if model.ready else "no"
        shown.add_row(
            model.name, model.variant_of, ready, str(model.context_tokens), str(model.vocabulary_size)
        )
    wide_console().print(shown)
