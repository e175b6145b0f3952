"""How fast a queue empties, learned from what left it.

Pure. What leaves a queue that somebody waits in all the time tells what the fleet can do; what
leaves one that runs empty tells only what was asked. So a window counts where no more left than
waited at its start, which is possible only if somebody waited throughout. A window ends when
something has left; one that does not end is a stall, and no slow rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY_S = 5.0
"""A window this long weighs 63 % in the rate."""
SHORTEST_WINDOW_S = 0.2
ENOUGH_S = 1.0
"""Seconds of full windows after which the rate is believed."""
UNKNOWN_STALL_S = 60.0
SHORTEST_STALL_S = 5.0
STALL_REQUESTS = 5.0
"""The queue stalls where nothing leaves in the time in which so many requests usually do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A queue at one moment."""

    at_s: float
    served_tokens: float
    """Left it for a worker since ever."""
    served_requests: int
    waiting_requests: int
    slots: int
    """Sequences that the workers behind it run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRate:
    """What is known of one queue's speed."""

    tokens_per_s: float = 0.0
    mean_tokens: float = 0.0
    """Of a request that left; 0: none did."""
    seen_s: float = 0.0
    """Length of the windows that count."""
    start: Look | None = None
    """Of the window that has not ended."""
    stalled_s: float = 0.0
    """Since when nothing leaves though somebody waits; 0 where that is usual."""

    @property
    def is_known(self) -> bool:
        return self.seen_s >= ENOUGH_S


def observe(rate: DrainRate, look: Look) -> DrainRate:
    """The rate after another look at the queue."""
    start = rate.start
    if start is None or look.served_requests < start.served_requests:
        return replace(rate, start=look, stalled_s=0.0)  # Or the counters began anew.
    tokens, requests = look.served_tokens - start.served_tokens, look.served_requests - start.served_requests
    window_s = look.at_s - start.at_s
    if requests == 0:
        if look.waiting_requests == 0 or start.waiting_requests == 0:
            return replace(rate, start=look, stalled_s=0.0)
        return replace(rate, stalled_s=window_s if window_s > _stall_s(rate) else 0.0)
    if window_s < SHORTEST_WINDOW_S:
        return rate
    known, seen_s = rate.tokens_per_s, rate.seen_s
    if look.slots != start.slots and look.slots > 0 and start.slots > 0:
        known *= look.slots / start.slots
    waited = look.waiting_requests > 0 and start.waiting_requests >= requests
    if waited and window_s <= _stall_s(rate):
        # A mean over all windows at first, which then forgets.
        weight = max(1.0 - math.exp(-window_s / MEMORY_S), window_s / (seen_s + window_s))
        known += weight * (tokens / window_s - known)
        seen_s += window_s
    share = tokens / requests
    mean = share if rate.mean_tokens == 0.0 else rate.mean_tokens + 0.1 * (share - rate.mean_tokens)
    return DrainRate(tokens_per_s=known, mean_tokens=mean, seen_s=seen_s, start=look)


def _stall_s(rate: DrainRate) -> float:
    if not rate.is_known or rate.tokens_per_s <= 0.0:
        return UNKNOWN_STALL_S
    return max(SHORTEST_STALL_S, STALL_REQUESTS * rate.mean_tokens / rate.tokens_per_s)
