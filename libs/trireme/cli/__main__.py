"""The `trireme` command: one module per subcommand, registered here."""

from __future__ import annotations

import typer

from trireme.cli.bench import bench
from trireme.cli.chat import chat
from trireme.cli.demo import demo
from trireme.cli.doctor import doctor
from trireme.cli.down import down
from trireme.cli.explain import explain
from trireme.cli.generate import generate
from trireme.cli.import_gguf import import_gguf
from trireme.cli.keys import keys
from trireme.cli.models import models
from trireme.cli.quantize import quantize
from trireme.cli.scale import scale
from trireme.cli.simulate import simulate
from trireme.cli.status import status
from trireme.cli.tls import tls
from trireme.cli.top import top
from trireme.cli.up import up

COMMANDS = (
    *(demo, up, status, down, generate, chat, models, scale, explain, doctor, top, bench, simulate),
    *(quantize, import_gguf),
)

app = typer.Typer(
    name="trireme",
    help="Run a fleet that serves language models, look at it, and ask it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(keys)
app.add_typer(tls)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
