"""What jobs have needed lately, kept in bounded memory, for `quanta`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

from trireme.policies.quanta import Demand, Thresholds, choose_thresholds, distribution
from trireme.policies.run_queue import Entry

_KEPT = 512
"""Ended jobs, and arrivals, that are remembered."""
_UNENDED = 512
"""Jobs under way that are looked at."""
_FIRST = 16
"""Ended jobs before anything is chosen."""
_PERIOD = 32
"""Ended jobs between two choices."""


class DemandRecord:
    """Arrivals and demands. Charged time is wall time; a job's demand is its share of it."""

    def __init__(self) -> None:
        self._ended: deque[Demand] = deque(maxlen=_KEPT)
        self._arrivals_s: deque[float] = deque(maxlen=_KEPT)
        self._until_choice = _FIRST
        self._charged_s = 1e-12
        self._shared_s = 1e-12

    def arrive(self, now_s: float) -> None:
        """A job has come."""
        self._arrivals_s.append(now_s)

    def charge(self, entry: Entry, seconds: float, members: int) -> None:
        """A job ran among `members` for `seconds`."""
        entry.demand_s += seconds / members
        self._charged_s += seconds
        self._shared_s += seconds / members

    def end(self, entry: Entry) -> bool:
        """A job has ended; whether it is time to choose anew."""
        if entry.demand_s <= 0.0:
            return False
        self._ended.append(Demand(entry.demand_s, is_complete=True))
        self._until_choice -= 1
        return self._until_choice <= 0

    def choose(self, under_way: Iterable[Entry], *, now_s: float) -> Thresholds:
        """Thresholds, in charged time, for the demand as it is now."""
        self._until_choice = _PERIOD
        sample = list(self._ended)
        sample += [
            Demand(entry.demand_s, is_complete=False)
            for entry in islice(under_way, _UNENDED)
            if entry.demand_s > 0.0
        ]
        span_s = now_s - self._arrivals_s[0] if self._arrivals_s else 0.0
        if span_s <= 0.0:
            return Thresholds((), "nothing is known of the arrivals")
        chosen = choose_thresholds(
            distribution(sample), arrivals_per_s=len(self._arrivals_s) / span_s, horizon_s=span_s
        )
        # A job is charged each iteration whole, whoever shares it.
        per_share = self._charged_s / self._shared_s
        return Thresholds(tuple(end_s * per_share for end_s in chosen.ends_s), chosen.reason)
