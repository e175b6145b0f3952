"""Time as a thing that is passed in."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component reads time; tests pass one they move by hand."""

    def unix_s(self) -> float:
        """Seconds since 1970, comparable between processes."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start, never going back."""
        ...


class SystemClock:
    """The operating system's clocks."""

    def unix_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()
