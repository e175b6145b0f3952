"""Learn an iteration profile from the iterations themselves, where none is stored.

    seconds ~ a + b * new tokens + c * sequences + d * KV tokens read + e * (query, key) pairs

Least squares in relative error with forgetting, so that a change of clock or neighbours is followed.
A decode iteration at batch 1 is also remembered as such, since the first quantum rests on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from trireme.policies.iteration_profile import DecodePoint, IterationProfile, Part, PrefillPoint
from trireme.policies.least_squares import solve_non_negative

_SCALES = (1.0, 1e-2, 1e-1, 1e-4, 1e-6)
"""Bring the five features to comparable size."""
_TOKENS = tuple(2**power for power in range(13))
_CACHED = (0, 512, 2048, 8192)
_BATCHES = tuple(2**power for power in range(9))
_CONTEXTS = (64, 1024, 8192)

Features = tuple[float, float, float, float, float]


class ProfileEstimator:
    """Iterations seen so far, as sums.

    Args:
        least: iterations, a chunk of a prompt among them, before there is a profile.
        forgetting: weight of the past at each new one; 0.998 forgets half in 350.
        spike: a time above this many times the expected one counts as that many times: a stall, not news.
    """

    def __init__(self, *, least: int = 16, forgetting: float = 0.998, spike: float = 4.0) -> None:
        self._least = least
        self._forgetting = forgetting
        self._spike = spike
        self._gram = [[0.0] * 5 for _ in range(5)]
        self._moments = [0.0] * 5
        self._weights: list[float] | None = None
        self._num_seen = 0
        self._has_chunk = False
        self._alone: deque[tuple[int, float]] = deque(maxlen=64)
        """(context, seconds) of the last decode iterations at batch 1."""

    def observe(self, parts: Iterable[Part], seconds: float) -> None:
        """One iteration's composition and wall time; what is no time or no composition is ignored."""
        told = tuple(parts)
        if not told or not 0.0 < seconds < float("inf"):
            return
        row = _features(told)
        if self._weights is not None:
            expected_s = _dot(self._weights, row)
            if expected_s > 0.0:
                seconds = min(seconds, self._spike * expected_s)
        weight = 1.0 / (seconds * seconds)
        keep = self._forgetting
        for i, left in enumerate(row):
            line = self._gram[i]
            for j, right in enumerate(row):
                line[j] = keep * line[j] + weight * left * right
            self._moments[i] = keep * self._moments[i] + weight * left * seconds
        self._num_seen += 1
        self._has_chunk |= any(part.new_tokens >= 8 for part in told)
        if len(told) == 1 and told[0].sequences == 1 and told[0].new_tokens == 1 and told[0].cached_tokens:
            self._alone.append((told[0].cached_tokens + 1, seconds))
        if self._num_seen >= self._least and self._num_seen & (self._num_seen - 1) == 0:
            self._weights = solve_non_negative(self._gram, self._moments)

    def profile(self) -> IterationProfile | None:
        """What is known by now; None while it is too little."""
        if self._num_seen < self._least or not self._has_chunk:
            return None
        weights = self._weights = solve_non_negative(self._gram, self._moments)

        def seconds(part: Part) -> float:
            return _dot(weights, _features((part,)))

        prefill = [
            PrefillPoint(new, cached, seconds(Part(1, new, cached))) for cached in _CACHED for new in _TOKENS
        ]
        decode = [
            DecodePoint(batch, context, seconds(Part(batch, 1, context - 1)))
            for context in _CONTEXTS
            for batch in _BATCHES
        ]
        decode += [DecodePoint(1, context, second) for context, second in self._alone]
        return IterationProfile(tuple(prefill), tuple(decode))


def _features(parts: Iterable[Part]) -> Features:
    new_tokens = sequences = kv_tokens = pairs = 0
    for count, new, cached in parts:
        sequences += count
        new_tokens += count * new
        kv_tokens += count * (cached + new)
        pairs += count * (new * cached + new * (new + 1) // 2)
    _, new_scale, sequence_scale, kv_scale, pair_scale = _SCALES
    return (
        1.0,
        new_scale * new_tokens,
        sequence_scale * sequences,
        kv_scale * kv_tokens,
        pair_scale * pairs,
    )


def _dot(weights: Iterable[float], row: Iterable[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, row, strict=True))
