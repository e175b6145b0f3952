"""When the call that is being served came in: what it asks for is known only later, once it was read."""

from __future__ import annotations

import time
from contextvars import ContextVar

_ARRIVED: ContextVar[float] = ContextVar("arrived_unix_s")


def note_arrival() -> None:
    """A call comes in; what is done for it is done in this context."""
    _ARRIVED.set(time.time())


def arrived_unix_s() -> float:
    """When the call came in, seconds since 1970; now where nothing was noted."""
    return _ARRIVED.get(0.0) or time.time()
