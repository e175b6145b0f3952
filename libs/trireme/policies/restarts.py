"""How soon a process that died is started again.

Pure: time is passed in. The first restart is prompt, since most deaths are alone; each
further one that follows quickly waits twice as long, up to a cap.
"""

from __future__ import annotations

from dataclasses import dataclass

STABLE_S = 20.0
"""A process that lived so long did not die of its start."""
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 15.0
CRASH_LOOP_DEATHS = 3
"""Quick deaths in a row that are called a crash loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartHistory:
    """What is remembered of one process's deaths."""

    restarts: int = 0
    """Deaths in all."""
    quick_deaths: int = 0
    """Deaths in a row before `STABLE_S`."""
    not_before_s: float = 0.0
    """When it may be started again, on the caller's clock."""

    @property
    def is_crash_looping(self) -> bool:
        return self.quick_deaths >= CRASH_LOOP_DEATHS


def after_death(history: RestartHistory, *, lived_s: float, now_s: float) -> RestartHistory:
    """The history with one more death; `not_before_s` says when the next start is due."""
    quick = 1 if lived_s >= STABLE_S else history.quick_deaths + 1
    delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(quick - 1, 16))
    return RestartHistory(
        restarts=history.restarts + 1,
        quick_deaths=quick,
        not_before_s=now_s + delay_s,
    )
