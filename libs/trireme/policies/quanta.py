"""Where the levels of a feedback queue should lie, given how much service jobs have turned out to need.

A feedback queue whose quanta ignore the demand serves jobs of similar length nearly in parallel: all have a
first token soon and none an end. First come, first served is then better; with a heavy tail it is far
worse. Both are ends of one scale. Here thresholds of attained service are chosen by what a model of the
queue says of the recent demand; a threshold above all demands means first come, first served.

The model is a feedback queue, first in, first out inside a level: a job of demand x that ends in level k
waits for what all jobs bring to levels 1..k and is delayed by newcomers to the levels above:

    T(x) = (W_k + x) / (1 - rho_{k-1}),    rho_k = lambda E[min(x, a_k)],
    W_k  = lambda E[min(x, a_k)^2] / (2 (1 - rho_k))

with a_k the end of level k (Kleinrock, Queueing Systems II, 1976, section 4.7). Over a bounded horizon H the
work in a queue at or above saturation is what has piled up meanwhile.

What is minimised is the mean of T / x, how late an answer is for its length, among the levels that make
the mean of T hardly worse than first come, first served does: between similar jobs the short gain nothing
that the others would not lose many times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_POINTS = 64
"""Demands that stand for the sample."""
_STARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Quantiles of the demand at which the first level may end."""
_RATIOS = (2.0, 4.0, 8.0, math.inf)
"""A level ends at so many times the end of the one above."""
_MARGIN = 0.95
"""The mean slowdown must be better than with first come, first served by so much: the model errs."""
_WORSE = 1.1
"""The mean time may be so many times that of first come, first served."""
_OUTLIER = 2.0
"""Without levels, what needs so many times the longest demand still lets all others pass."""
_DRIFT = 0.5
"""Work of a queue just at saturation, as a share of the square root of what comes and its spread."""


class Demand(NamedTuple):
    """What one job has needed."""

    service_s: float
    """Of a server of its own: its share of the iterations it ran in."""
    is_complete: bool
    """False: it has not ended, so it needs more than this."""


class Point(NamedTuple):
    """A demand and the share of jobs that have it."""

    service_s: float
    weight: float


class Times(NamedTuple):
    """What jobs take from coming to ending."""

    mean_s: float
    slowdown: float
    """Mean of the time over the demand."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where levels end, in attained service, ascending; the last level has no end."""

    ends_s: tuple[float, ...]
    reason: str


def distribution(sample: Sequence[Demand]) -> list[Point]:
    """The demand's distribution, ascending, at most 64 points; weights sum to 1.

    The weight of a job that has not ended goes to those that needed more (Kaplan and Meier, 1958); without
    that a sample taken under load would hold the short jobs only, which are the first to end.

    Returns:
        Nothing for an empty sample.
    """
    ordered = sorted(demand for demand in sample if 0.0 < demand.service_s < math.inf)
    points: list[Point] = []
    alive = 1.0
    for index, demand in enumerate(ordered):
        left = len(ordered) - index
        if demand.is_complete or left == 1:
            weight = alive / left
            points.append(Point(demand.service_s, weight))
            alive -= weight
    if points and alive > 0.0:
        points[-1] = Point(points[-1].service_s, points[-1].weight + alive)
    return _thinned(points)


def choose_thresholds(
    demand: Sequence[Point], *, arrivals_per_s: float, horizon_s: float, most: int = 8
) -> Thresholds:
    """The best of first come, first served and some forty sets of levels.

    Args:
        demand: as `distribution` gives it.
        arrivals_per_s: how often jobs come.
        horizon_s: how long they have come like that; bounds the work that piles up.
        most: thresholds in a set.
    """
    if not demand or arrivals_per_s <= 0.0 or horizon_s <= 0.0:
        return Thresholds((), "nothing is known of the demand")
    model = _Queue(demand, arrivals_per_s, horizon_s)
    alone = model.times(())
    best: tuple[float, ...] = ()
    least = _MARGIN * alone.slowdown
    longest_s = demand[-1].service_s
    for start in _STARTS:
        first_s = _quantile(demand, start)
        for ratio in _RATIOS:
            ends: list[float] = []
            end_s = first_s
            while end_s < longest_s and len(ends) < most:
                ends.append(end_s)
                end_s *= ratio
            times = model.times(tuple(ends))
            if times.slowdown < least and times.mean_s <= _WORSE * alone.mean_s:
                best, least = tuple(ends), times.slowdown
    if not best:
        outlier_s = _OUTLIER * longest_s
        return Thresholds((outlier_s,), f"demands are too alike for levels, but beyond {outlier_s:.3g} s")
    share = least / alone.slowdown
    return Thresholds(best, f"{len(best) + 1} levels promise {share:.2f} of the slowdown without them")


class _Queue:
    """The model; see the module."""

    def __init__(self, demand: Sequence[Point], arrivals_per_s: float, horizon_s: float) -> None:
        self._demand = demand
        self._arrivals_per_s = arrivals_per_s
        self._horizon_s = horizon_s

    def times(self, ends_s: tuple[float, ...]) -> Times:
        """With these levels."""
        bounds = (*ends_s, math.inf)
        loads = [self._load(end_s) for end_s in bounds]
        works = [self._work(end_s, load) for end_s, load in zip(bounds, loads, strict=True)]
        level = 0
        mean_s = mean_slowdown = 0.0
        for service_s, weight in self._demand:
            while service_s > bounds[level]:
                level += 1
            above = loads[level - 1] if level else 0.0
            time_s = works[level] + service_s
            # Newcomers to the levels above go first; those of this queue end with the horizon at the latest.
            time_s = (
                min(time_s / (1.0 - above), self._horizon_s + time_s)
                if above < 1.0
                else (self._horizon_s + time_s)
            )
            mean_s += weight * time_s
            mean_slowdown += weight * time_s / service_s
        return Times(mean_s, mean_slowdown)

    def _load(self, end_s: float) -> float:
        return self._arrivals_per_s * sum(
            weight * min(service_s, end_s) for service_s, weight in self._demand
        )

    def _work(self, end_s: float, load: float) -> float:
        spread = self._arrivals_per_s * sum(
            weight * min(service_s, end_s) ** 2 for service_s, weight in self._demand
        )
        piled = _DRIFT * math.sqrt(spread * self._horizon_s)
        if load >= 1.0:
            return piled + 0.5 * (load - 1.0) * self._horizon_s
        return min(piled, spread / (2.0 * (1.0 - load)))


def _quantile(demand: Sequence[Point], share: float) -> float:
    total = 0.0
    for service_s, weight in demand:
        total += weight
        if total >= share:
            return service_s
    return demand[-1].service_s


def _thinned(points: list[Point]) -> list[Point]:
    """Neighbours joined, each group at its mean, so that means stay."""
    if len(points) <= _POINTS:
        return points
    thin: list[Point] = []
    weight = service_s = 0.0
    for point in points:
        weight += point.weight
        service_s += point.weight * point.service_s
        if weight >= 1.0 / _POINTS:
            thin.append(Point(service_s / weight, weight))
            weight = service_s = 0.0
    if weight > 0.0:
        thin.append(Point(service_s / weight, weight))
    return thin
