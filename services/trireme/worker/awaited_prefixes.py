"""Sequences that await stored blocks, in the engine process: the worker is told when their turn is near.

The worker holds leases for the next few alone, so what waits deep in the queue keeps nothing in place. A
sequence whose turn is near and whose blocks do not come in time runs without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

NEAR = 8
"""The next so many have their blocks loaded while they wait."""
PERIOD_S = 0.05
"""Between two tellings of an order that changes farther back."""
LOOKED_AT = 1024
"""Waiting sequences that are looked at; those behind are too far away."""


class AwaitedPrefixes:
    """For one engine. `patience_s` counts from when a sequence's turn is near."""

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._ends_s: dict[str, float | None] = {}
        """When each is not waited for any longer; None: its turn is not near."""
        self._told: tuple[str, ...] = ()
        self._told_s = 0.0

    def __bool__(self) -> bool:
        return bool(self._ends_s)

    def add(self, name: str) -> None:
        """A sequence awaits blocks."""
        self._ends_s[name] = None

    def discard(self, name: str) -> None:
        """It awaits none any more."""
        self._ends_s.pop(name, None)

    def look(
        self, upcoming: Iterable[tuple[str, float]], *, now_s: float
    ) -> tuple[tuple[str, float], ...] | None:
        """Given those that wait, next first: the order of these, where the worker is to be told it."""
        order = [pair for pair in islice(upcoming, LOOKED_AT) if pair[0] in self._ends_s]
        for name, _ in order[:NEAR]:
            if self._ends_s[name] is None:
                self._ends_s[name] = now_s + self._patience_s
        names = tuple([name for name, _ in order])
        if names == self._told:
            return None
        if names[:NEAR] == self._told[:NEAR] and now_s - self._told_s < PERIOD_S:
            return None
        self._told, self._told_s = names, now_s
        return tuple(order)

    def overdue(self, *, now_s: float) -> list[str]:
        """Those whose blocks came too late; they await nothing any more."""
        late = [name for name, end_s in self._ends_s.items() if end_s is not None and end_s <= now_s]
        for name in late:
            del self._ends_s[name]
        return late
