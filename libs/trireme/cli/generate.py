"""`trireme generate`: one prompt, answered in the terminal as it is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


@failing_clearly
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model or a variant.")] = "trireme-py",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set with this mass.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    session: Annotated[str, typer.Option(help="Calls that share it find each other's KV.")] = "",
    slo: Annotated[str, typer.Option(help="interactive, standard or batch.")] = "interactive",
    context_overflow: Annotated[
        str,
        typer.Option(help="When the context is full: error, truncate_oldest or truncate_pinned."),
    ] = "",
    pinned_tokens: Annotated[
        int | None, typer.Option(min=0, help="For truncate_pinned: first tokens of the prompt that stay.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the answer.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line about time and energy.")] = False,
    address: Annotated[
        list[str] | None, typer.Option(help="host:port of a gateway's gRPC server; repeatable.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The fleet's run directory.")] = Path(".run"),
) -> None:
    """Continue a prompt. The answer goes to standard output, all else to standard error.

    Examples:

        trireme generate "def fibonacci(n):" --temperature 0

        trireme generate - --max-tokens 400 --stop "def " < half_a_file.py
    """
    import sys

    from trireme.cli.answering import print_answer, show_summary
    from trireme.cli.connecting import gateway_addresses
    from trireme.client import Sampling, SyncTriremeClient

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or ()
    )
    if echo:
        print(text, end="", flush=True)
    with SyncTriremeClient(gateway_addresses(address or (), run_dir)) as client:
        events = client.generate(
            model,
            text,
            sampling,
            session_id=session,
            slo=slo,
            context_overflow=context_overflow,
            pinned_tokens=pinned_tokens,
        )
        answer = print_answer(events)
    print()
    if not quiet:
        show_summary(answer)
