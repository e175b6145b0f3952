"""`trireme chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def chat(
    model: Annotated[str, typer.Option("--model", "-m", help="A model or a variant.")] = "trireme-py",
    system: Annotated[str, typer.Option(help="Instruction that the conversation begins with.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")] = None,
    context_overflow: Annotated[
        str,
        typer.Option(help="When the context is full: error, truncate_oldest or truncate_pinned."),
    ] = "",
    address: Annotated[
        list[str] | None, typer.Option(help="host:port of a gateway's gRPC server; repeatable.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Talk. All turns share a session, so the fleet finds the KV of the turns before.

    /reset forgets the conversation; Ctrl-D ends it; Ctrl-C stops an answer.

    Example:

        trireme chat --temperature 0.7 --context-overflow truncate_pinned
    """
    from trireme.cli.answering import converse
    from trireme.cli.connecting import gateway_addresses
    from trireme.client import Sampling, SyncTriremeClient

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, stop=stop or ())
    with SyncTriremeClient(gateway_addresses(address or (), run_dir)) as client:
        converse(client, model, sampling, system=system, context_overflow=context_overflow)
