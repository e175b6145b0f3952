"""How long an iteration takes: a measured grid, interpolated, and extrapolated by a fit above it.

A prompt's first iteration is read from a grid of new tokens by cached tokens, a decode iteration from one
of batch by context. Inside, values are interpolated linearly; above, a + b*x + c*x^2 fitted by least
squares goes on from the last measured point (clamping would price long prompts too low).

What was not measured, or is not a positive number, is None: the caller decides without it and counts that.

Source: profiler of FastServe (arXiv 2305.05920, section 4.2; its artifact clamps above the grid).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trireme.errors import InvalidConfiguration
from trireme.policies.least_squares import non_negative_solution


class Part(NamedTuple):
    """Sequences of one iteration that are alike."""

    sequences: int
    new_tokens: int
    """Of each, computed in the iteration."""
    cached_tokens: int
    """Of each, the context before the iteration."""


class PrefillPoint(NamedTuple):
    """One prompt, or chunk of it, alone in an iteration."""

    new_tokens: int
    cached_tokens: int
    seconds: float


class DecodePoint(NamedTuple):
    """A batch of sequences that decode one token each."""

    batch: int
    context_tokens: int
    """Mean over the batch, this token included."""
    seconds: float


@dataclass(frozen=True, slots=True)
class IterationProfile:
    """Measured times of iterations of one model on one device at one clock."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    quantum_s: float | None = field(init=False, compare=False)
    """The 10th percentile of decode iterations at batch 1: q_1 of the queues."""
    _prefill_grid: _Grid = field(init=False, repr=False, compare=False)
    _decode_grid: _Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefill_grid", _Grid(self.prefill))
        object.__setattr__(self, "_decode_grid", _Grid(self.decode))
        alone = sorted(p.seconds for p in self.decode if p.batch == 1 and _is_time(p.seconds))
        object.__setattr__(self, "quantum_s", alone[len(alone) // 10] if alone else self.decode_s(1))

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Iterable[Sequence[int]], float]]) -> IterationProfile:
        """Those of measured (parts, seconds) that hold one chunk alone or decoding sequences alone.

        Args:
            samples: a part is (sequences, new tokens, cached tokens) as in `Part`.
        """
        prefill: list[PrefillPoint] = []
        decode: list[DecodePoint] = []
        for parts, seconds in samples:
            told = [Part(*part) for part in parts]
            sequences = sum(part.sequences for part in told)
            if told and all(part.new_tokens == 1 and part.cached_tokens > 0 for part in told):
                context = sum(part.sequences * (part.cached_tokens + 1) for part in told) // sequences
                decode.append(DecodePoint(sequences, context, seconds))
            elif sequences == 1:
                prefill.append(PrefillPoint(told[0].new_tokens, told[0].cached_tokens, seconds))
        return cls(tuple(prefill), tuple(decode))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> IterationProfile:
        """What `to_dict` gave.

        Raises:
            InvalidConfiguration: it has another form.
        """
        try:
            return cls(
                tuple(
                    PrefillPoint(int(new), int(cached), float(s)) for new, cached, s in document["prefill"]
                ),
                tuple(
                    DecodePoint(int(batch), int(context), float(s))
                    for batch, context, s in document["decode"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidConfiguration(f"this is no iteration profile: {error!r}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"prefill": [list(point) for point in self.prefill], "decode": [list(p) for p in self.decode]}

    def scaled(self, clock_ratio: float) -> IterationProfile:
        """The same at another clock.

        Args:
            clock_ratio: new clock / profiled clock, positive. All times are divided by it: right for work
                that computation bounds, an upper estimate of the change for work that memory bounds.
        """
        return IterationProfile(
            tuple(point._replace(seconds=point.seconds / clock_ratio) for point in self.prefill),
            tuple(point._replace(seconds=point.seconds / clock_ratio) for point in self.decode),
        )

    def first_iteration_s(self, new_tokens: int, cached_tokens: int = 0) -> float | None:
        """One prompt of `new_tokens` after `cached_tokens` that are there already, alone."""
        return self._prefill_grid.value(new_tokens, cached_tokens)

    def decode_s(self, batch: int, context_tokens: int | None = None) -> float | None:
        """One token for each of `batch` sequences; without a context, at the middle one that was measured."""
        return self._decode_grid.value(batch, context_tokens)

    def iteration_s(self, parts: Iterable[Part]) -> float | None:
        """Any iteration: the sum of its chunks and its decoding sequences, fixed costs counted once."""
        pieces: list[float | None] = []
        batch = context = 0
        for sequences, new_tokens, cached_tokens in parts:
            if new_tokens == 1 and cached_tokens > 0:
                batch += sequences
                context += sequences * (cached_tokens + 1)
            else:
                pieces.extend([self.first_iteration_s(new_tokens, cached_tokens)] * sequences)
        if batch:
            pieces.append(self.decode_s(batch, context // batch))
        known = [piece for piece in pieces if piece is not None]
        if not known or len(known) < len(pieces):
            return None
        return max(max(known), sum(known) - (len(known) - 1) * (self.quantum_s or 0.0))


class _Curve:
    """Seconds by one count: linear between the points, flat below, a fitted parabola above."""

    def __init__(self, points: Mapping[int, list[float]]) -> None:
        self.x = sorted(points)
        self.y = [_median(points[x]) for x in self.x]
        last = self.x[-1]
        weights = non_negative_solution(
            [(1.0, x / last, (x / last) ** 2)[: len(self.x)] for x in self.x], self.y
        )
        _, slope, curvature = (*weights, 0.0, 0.0)[:3]
        self.slope = slope / last
        self.curvature = curvature / last**2

    def value(self, x: float) -> float:
        xs, ys = self.x, self.y
        if x <= xs[0]:
            return ys[0]
        last = xs[-1]
        if x >= last:
            return ys[-1] + self.slope * (x - last) + self.curvature * (x * x - last * last)
        above = bisect_left(xs, x)
        share = (x - xs[above - 1]) / (xs[above] - xs[above - 1])
        return ys[above - 1] + share * (ys[above] - ys[above - 1])


class _Grid:
    """Curves by a second count, the context. A context with few points makes no curve of its own."""

    def __init__(self, points: Iterable[tuple[int, int, float]]) -> None:
        rows: dict[int, dict[int, list[float]]] = {}
        for x, context, seconds in points:
            if x >= 1 and context >= 0 and _is_time(seconds):
                rows.setdefault(context, {}).setdefault(x, []).append(seconds)
        most = max(map(len, rows.values()), default=0)
        self.contexts = sorted(context for context, row in rows.items() if 2 * len(row) >= most)
        self.curves = [_Curve(rows[context]) for context in self.contexts]

    def value(self, x: int, context: int | None) -> float | None:
        if not self.curves or x < 1:
            return None
        if context is None:
            context = self.contexts[len(self.contexts) // 2]
        seconds = self._at(x, context)
        return seconds if _is_time(seconds) else None

    def _at(self, x: int, context: int) -> float:
        contexts, curves = self.contexts, self.curves
        if len(curves) == 1:
            # A prompt of n tokens costs c*n^2 in attention; n more after h of them 2*c*n*h + c*n^2.
            curve = curves[0]
            return curve.value(x) + 2 * curve.curvature * x * max(0, context - contexts[0])
        above = min(max(bisect_left(contexts, context), 1), len(contexts) - 1)
        low, high = curves[above - 1].value(x), curves[above].value(x)
        share = (context - contexts[above - 1]) / (contexts[above] - contexts[above - 1])
        rise = max(0.0, high - low) if share > 1.0 else high - low
        return low + max(0.0, share) * rise


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _is_time(seconds: float) -> bool:
    return 0.0 < seconds < math.inf
