"""What SimPy's clock lacks: a callback at a time and with a priority, and a link that copies in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from simpy import Environment, Event

from trireme.errors import InvalidConfiguration
from trireme.simulator.requests import on_tick

ARRIVAL: Final = 0
COPIED: Final = 1
ITERATION: Final = 2
"""Order of what happens at the same instant: an iteration that ends sees all that came by then."""


class Call(Event):
    """Calls `action()` after `delay_s`. Cheaper than a process: a million requests make many."""

    def __init__(
        self, env: Environment, delay_s: float, action: Callable[[], None], *, priority: int
    ) -> None:
        self.env = env
        self.callbacks = [self._fire]
        self._value = None
        self._ok = True
        self._defused = False
        self.action: Callable[[], None] | None = action
        env.schedule(self, priority=priority, delay=delay_s)  # type: ignore[arg-type]

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        self.action = None

    def _fire(self, event: Any) -> None:
        if self.action is not None:
            self.action()


class Link:
    """A link, one direction: copies go one after the other, in the order they were asked for.

    Args:
        bytes_per_s: what one copy reaches.
        latency_s: added to each copy.

    Raises:
        InvalidConfiguration: the link has no bandwidth.
    """

    def __init__(self, env: Environment, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        if not bytes_per_s > 0:
            raise InvalidConfiguration(f"a link of {bytes_per_s} B/s copies nothing", param="--link")
        self._env = env
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._free_s = 0.0
        self.copied_bytes = 0
        self.busy_s = 0.0

    def copy(self, num_bytes: int, on_copied: Callable[[], None], *, not_before_s: float = 0.0) -> float:
        """Start a copy as soon as those before it have ended; returns when it will have ended."""
        starts_s = max(self._env.now, self._free_s, not_before_s)
        seconds = on_tick(self._latency_s + num_bytes / self._bytes_per_s)
        self._free_s = starts_s + seconds
        self.copied_bytes += num_bytes
        self.busy_s += seconds
        Call(self._env, self._free_s - self._env.now, on_copied, priority=COPIED)
        return self._free_s

    @property
    def free_s(self) -> float:
        """When all copies so far will have ended."""
        return max(self._env.now, self._free_s)
