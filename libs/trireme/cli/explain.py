"""`trireme explain`: why a request went where it went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="As the answer's events name it.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Show the scheduler's decisions for a request, and what else it considered.

    A request is known until two minutes after its end.

    Example:

        trireme explain req-5f2c9d
    """
    from trireme.cli import explaining

    explaining.explain_request(request_id, run_dir, as_json=as_json)
