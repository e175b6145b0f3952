"""Which decode steps are replayed from a graph that was captured before, and when one is captured.

A graph has fixed shapes: so many rows, and block tables of a fixed width. A step takes the smallest graph
that holds its rows; those left over are padding. All graphs have one width. A step that needs more gets
graphs twice as wide, or wider, and the old ones are dropped: that happens a logarithmic number of times.

Pure: `plan` takes what was captured so far and gives what is captured next.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from trireme.errors import InvalidConfiguration

_FIRST_WIDTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """Raises InvalidConfiguration: a value is out of range."""

    buckets: tuple[int, ...]
    """Rows that graphs have, rising."""
    most_width: int
    """Blocks of the longest sequence."""

    def __post_init__(self) -> None:
        if not self.buckets or self.buckets[0] < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise InvalidConfiguration(f"buckets are {self.buckets}; they must be at least 1 and rise")
        if self.most_width < 1:
            raise InvalidConfiguration(f"most_width is {self.most_width}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What there is. The default is nothing."""

    width: int = 0
    """Blocks of a row of every graph's block tables."""
    buckets: frozenset[int] = frozenset()
    """Rows of the graphs there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """What a step does."""

    bucket: int | None
    """Rows of its graph; None: it runs without one."""
    drops: bool = False
    """All graphs are dropped first."""
    captures: bool = False
    """Its graph is captured first."""
    after: Captured
    """What there is then."""
    reason: str


def buckets_up_to(most: int) -> tuple[int, ...]:
    """Rows that graphs have for steps of up to `most` rows: finer where a row is a larger part of them."""
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, most + 128, 128))
    smaller = tuple([rows for rows in steps if rows < most])
    return (*smaller, most)


def plan(captured: Captured, limits: GraphLimits, *, rows: int, width: int) -> GraphPlan:
    """Which graph a step of `rows` decoding sequences takes, whose longest has `width` blocks."""
    at = bisect_left(limits.buckets, rows)
    if rows < 1 or at == len(limits.buckets):
        return GraphPlan(bucket=None, after=captured, reason=f"no graph has {rows} rows")
    if width > limits.most_width:
        return GraphPlan(bucket=None, after=captured, reason=f"no graph has {width} blocks a row")
    bucket = limits.buckets[at]
    if width > captured.width:
        wider = min(limits.most_width, max(_FIRST_WIDTH, 1 << (width - 1).bit_length()))
        return GraphPlan(
            bucket=bucket,
            drops=bool(captured.buckets),
            captures=True,
            after=Captured(width=wider, buckets=frozenset({bucket})),
            reason=f"{width} blocks outgrow {captured.width}: graphs of {wider} from now on",
        )
    if bucket in captured.buckets:
        return GraphPlan(bucket=bucket, after=captured, reason=f"replays {bucket} rows for {rows}")
    return GraphPlan(
        bucket=bucket,
        captures=True,
        after=replace(captured, buckets=captured.buckets | {bucket}),
        reason=f"the first step of up to {bucket} rows",
    )
