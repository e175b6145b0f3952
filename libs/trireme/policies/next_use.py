"""One key orders all evictions of KV, whatever it belongs to: how soon it is expected to be used.

    a sequence that was started      its ENST, from the iteration scheduler
    a queued request                 its expected wait in the queue, from the same
    an idle session                  its predicted return; never, where nothing predicts it

The KV that is needed last leaves first. A started sequence whose time equals another's stays before a queued
request, and that before an idle session: what losing it costs falls in that order (a user sees a pause, a
user waits longer, nobody waits yet).
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple


class Holder(enum.IntEnum):
    """Whose KV it is; among equal times the larger leaves first."""

    STARTED = 0
    QUEUED = 1
    IDLE = 2


class NextUse(NamedTuple):
    """Sorts by time, then holder, then the last use; the largest is evicted first."""

    seconds: float
    """From now; infinity: never, as far as anybody knows."""
    holder: Holder
    unused_s: float
    """Since its last use."""


def of_sequence(next_use_s: float, *, has_started: bool, unused_s: float = 0.0) -> NextUse:
    """A sequence of the iteration scheduler.

    Args:
        next_use_s: what `IterationScheduler.next_use_s` says; below 0 or not a number counts as now.
    """
    seconds = next_use_s if next_use_s > 0.0 else 0.0
    return NextUse(seconds, Holder.STARTED if has_started else Holder.QUEUED, unused_s)


def of_idle_session(unused_s: float, *, predicted_gap_s: float | None = None) -> NextUse:
    """A session between two turns.

    Args:
        unused_s: since its last turn ended.
        predicted_gap_s: expected time between that and its next turn; None: unknown. One that is overdue
            is expected after as long again as it is late: the longer it stays away, the farther it is.
    """
    if predicted_gap_s is None or not predicted_gap_s >= 0.0:
        return NextUse(math.inf, Holder.IDLE, unused_s)
    return NextUse(abs(predicted_gap_s - unused_s), Holder.IDLE, unused_s)
