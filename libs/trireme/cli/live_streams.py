"""Many answers at once on one terminal: each stream's progress and newest words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trireme.load.outcome import Outcome

TAIL = 56
"""Characters of each answer that are shown."""


class LiveStreams:
    """Redrawn a few times a second while requests run; on a file it prints the end only."""

    def __init__(self, console: Console, answer_tokens: int) -> None:
        self.answer_tokens = answer_tokens
        self._console = console
        self._outcomes: list[Outcome] = []
        self._total = 0
        self._started_s = 0.0

    def add(self, outcome: Outcome) -> None:
        """Show this request from now on."""
        self._outcomes.append(outcome)

    def tokens(self) -> int:
        """Tokens that have come so far, over all requests."""
        return sum(outcome.answer_tokens or len(outcome.arrivals) for outcome in self._outcomes)

    @contextmanager
    def running(self, title: str, *, total: int) -> Iterator[None]:
        """Draw until the block ends."""
        self._console.rule(title, align="left")
        self._outcomes, self._total, self._started_s = [], total, time.monotonic()
        with Live(console=self._console, get_renderable=self._draw, refresh_per_second=12):
            yield
        if not self._console.is_terminal:
            self._console.print()

    def _draw(self) -> Group:
        rows = Table.grid(padding=(0, 1))
        for outcome in sorted(self._outcomes, key=lambda one: one.index):
            count = outcome.answer_tokens or len(outcome.arrivals)
            tail = " ".join(outcome.text.split())[-TAIL:]
            mark = "!" if outcome.error else ("✓" if outcome.ended_s else " ")
            rows.add_row(
                Text(f"{outcome.index:>3}"),
                ProgressBar(total=self.answer_tokens, completed=min(count, self.answer_tokens), width=16),
                Text(mark, style="red" if outcome.error else "green"),
                Text(outcome.error or tail, style="dim", overflow="crop", no_wrap=True),
            )
        elapsed_s = time.monotonic() - self._started_s
        done = sum(1 for outcome in self._outcomes if outcome.ended_s)
        line = f"{done}/{self._total} done, {self.tokens()} tokens in {elapsed_s:.1f} s"
        return Group(rows, Text(line))
