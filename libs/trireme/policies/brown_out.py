"""What is given up first when the fleet falls behind, step by step, before requests are refused.

Pure. The level rises one step at a time after the pressure has stood above the step's threshold
for `RISE_S`, and falls one step after it has stood below a lower threshold for the longer
`FALL_S`: a level that has just changed does not change back at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

RISE_S = 1.0
FALL_S = 5.0


class Level(enum.IntEnum):
    """Each level keeps what the levels below it do."""

    NORMAL = 0
    TRIMMED = 1
    """Answers whose length nobody asked for are kept short."""
    SHEDDING = 2
    """Requests of the batch class are refused."""
    ESSENTIAL = 3
    """Requests for several choices or for log-probabilities are refused."""


RISE_ABOVE = (0.5, 0.7, 0.9)
"""Pressure at which each level gives way to the next."""
FALL_BELOW = (0.25, 0.4, 0.6)
"""Pressure at which the level above falls back to each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrownOut:
    """The level, and since when the pressure calls for another one."""

    level: Level = Level.NORMAL
    rising_since_s: float | None = None
    falling_since_s: float | None = None


def step(state: BrownOut, *, pressure: float, now_s: float) -> BrownOut:
    """The state after a look at the pressure: expected wait over the wait that is allowed."""
    level = state.level
    rising = level < Level.ESSENTIAL and pressure >= RISE_ABOVE[level]
    falling = level > Level.NORMAL and pressure < FALL_BELOW[level - 1]
    if rising:
        since_s = now_s if state.rising_since_s is None else state.rising_since_s
        if now_s - since_s >= RISE_S:
            return BrownOut(level=Level(level + 1))
        return BrownOut(level=level, rising_since_s=since_s)
    if falling:
        since_s = now_s if state.falling_since_s is None else state.falling_since_s
        if now_s - since_s >= FALL_S:
            return BrownOut(level=Level(level - 1))
        return BrownOut(level=level, falling_since_s=since_s)
    return BrownOut(level=level)
