"""How long an iteration takes, from what is in it.

    seconds = linear(new tokens) + per_sequence * sequences + per_kv_token * KV tokens + per_pair * pairs

`linear` is piecewise linear and stands for all work that is done once per token, whatever its context:
projections, feed-forward, normalisation. A KV token is one whose keys and values a sequence reads; a pair
is a (query, key) of attention. A decoding sequence of context c has 1 new token, c KV tokens, c pairs.

Two sources fill it: `fitted` from iterations measured on a machine, `simulator.operators` from published
operator times.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration_profile import DecodePoint, IterationProfile, Part, PrefillPoint
from trireme.simulator.requests import TICK_S

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where a fitted `linear` may bend, as far as it was measured."""


PROFILE_TOKENS = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    8192,
)
PROFILE_CACHED_TOKENS = (0, 512, 2048, 8192)
PROFILE_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PROFILE_CONTEXTS = (64, 512, 2048)
"""The grid that policies are told."""


class Composition(NamedTuple):
    """What an iteration holds, as far as its time depends on it."""

    sequences: int
    new_tokens: int
    kv_tokens: int
    pairs: int


class Sample(NamedTuple):
    """One measured composition and its median seconds."""

    parts: tuple[Part, ...]
    seconds: float


def composition(parts: Iterable[Part]) -> Composition:
    """Add up parts."""
    sequences = new_tokens = kv_tokens = pairs = 0
    for count, new, cached in parts:
        sequences += count
        new_tokens += count * new
        kv_tokens += count * (cached + new)
        pairs += count * (new * cached + new * (new + 1) // 2)
    return Composition(sequences, new_tokens, kv_tokens, pairs)


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """Seconds of an iteration. Times come out on the simulator's ticks.

    Raises:
        InvalidConfiguration: a number is negative or not finite, or there is no knot.
    """

    name: str
    knot_tokens: tuple[int, ...]
    """Increasing; beyond the last, `linear` goes on with the last slope."""
    knot_s: tuple[float, ...]
    per_sequence_s: float = 0.0
    per_kv_token_s: float = 0.0
    per_pair_s: float = 0.0
    kv_bytes_per_token: int = 0
    """For swapping over a link."""
    link_bytes_per_s: float = 25e9
    """Device to host, each direction."""
    layers: int = 1
    """Of which each can be loaded while the one before it computes."""
    _linear_s: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = (*self.knot_s, self.per_sequence_s, self.per_kv_token_s, self.per_pair_s)
        if not all(0 <= number < math.inf for number in numbers):
            raise InvalidConfiguration(f"engine model {self.name}: times must be finite and not negative")
        rising = all(a < b for a, b in zip(self.knot_tokens, self.knot_tokens[1:], strict=False))
        if not self.knot_tokens or len(self.knot_tokens) != len(self.knot_s) or not rising:
            raise InvalidConfiguration(f"engine model {self.name}: knots must be increasing, one time each")
        if max(self.knot_s) <= 0:
            raise InvalidConfiguration(f"engine model {self.name}: an iteration takes no time")

    def iteration_s(self, sequences: int, new_tokens: int, kv_tokens: int, pairs: int) -> float:
        """Seconds of one iteration of this composition, at least one tick."""
        seconds = (
            self.linear_s(new_tokens)
            + self.per_sequence_s * sequences
            + self.per_kv_token_s * kv_tokens
            + self.per_pair_s * pairs
        )
        return max(1, round(seconds / TICK_S)) * TICK_S

    def decode_ends_s(self, sequences: int, kv_tokens: int, iterations: int) -> NDArray[np.float64]:
        """When each of so many iterations in which all sequences decode ends, seconds after the first starts.

        Args:
            kv_tokens: of the first; each next has one more per sequence.
        """
        fixed_s = self.linear_s(sequences) + self.per_sequence_s * sequences
        kv = kv_tokens + sequences * np.arange(iterations, dtype=np.float64)
        # The same operations in the same order as `iteration_s`, so that both give the same bits.
        seconds = fixed_s + self.per_kv_token_s * kv + self.per_pair_s * kv
        ends: NDArray[np.float64] = np.cumsum(np.maximum(np.rint(seconds / TICK_S), 1.0)) * TICK_S
        return ends

    def linear_s(self, new_tokens: int) -> float:
        """The part that depends on the number of new tokens alone."""
        known = self._linear_s.get(new_tokens)
        if known is None:
            known = self._linear_s[new_tokens] = self._interpolated_s(new_tokens)
        return known

    def _interpolated_s(self, new_tokens: int) -> float:
        tokens, seconds = self.knot_tokens, self.knot_s
        if len(tokens) == 1:
            return seconds[0]
        above = min(max(bisect_right(tokens, new_tokens), 1), len(tokens) - 1)
        slope = (seconds[above] - seconds[above - 1]) / (tokens[above] - tokens[above - 1])
        return max(0.0, seconds[above - 1] + slope * (new_tokens - tokens[above - 1]))

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """One sequence's prompt in one iteration."""
        return self.iteration_s(*composition([Part(1, new_tokens, cached_tokens)]))

    def decode_s(self, sequences: int, context_tokens: int) -> float:
        """One token for each of so many sequences of so many tokens."""
        return self.iteration_s(*composition([Part(sequences, 1, context_tokens - 1)]))

    def profile(self) -> IterationProfile:
        """What policies are told of this engine: prompts alone and decoding batches, on a regular grid."""
        return IterationProfile(
            tuple(
                PrefillPoint(new, cached, self.prefill_s(new, cached))
                for cached in PROFILE_CACHED_TOKENS
                for new in PROFILE_TOKENS
            ),
            tuple(
                DecodePoint(batch, context, self.decode_s(batch, context))
                for context in PROFILE_CONTEXTS
                for batch in PROFILE_BATCHES
            ),
        )

    def slowed(self, *, per_iteration_s: float = 0.0, factor: float = 1.0) -> EngineModel:
        """The same engine with a fixed cost added to each iteration, and all times multiplied."""
        return replace(
            self,
            knot_s=tuple(max(0.0, factor * seconds + per_iteration_s) for seconds in self.knot_s),
            per_sequence_s=factor * self.per_sequence_s,
            per_kv_token_s=factor * self.per_kv_token_s,
            per_pair_s=factor * self.per_pair_s,
        )


def fitted(samples: Sequence[Sample], *, name: str) -> EngineModel:
    """The model that comes closest to measured iterations, in relative error.

    Least squares with all coefficients at or above 0: what comes out negative is left out, most negative
    first.

    Raises:
        InvalidConfiguration: there are fewer samples than numbers to find, or one has no positive time.
    """
    if any(not 0 < sample.seconds < math.inf or not sample.parts for sample in samples):
        raise InvalidConfiguration(f"engine model {name}: a sample has no parts or no positive time")
    compositions = [composition(sample.parts) for sample in samples]
    most = max((c.new_tokens for c in compositions), default=0)
    knots = [tokens for tokens in KNOTS if tokens <= most]
    features = np.array([_features(c, knots) for c in compositions])
    seconds = np.array([sample.seconds for sample in samples])
    if not knots or len(samples) < len(knots) + 3:
        raise InvalidConfiguration(
            f"engine model {name}: {len(samples)} samples are too few for {len(knots) + 3} coefficients"
        )
    weights = _non_negative(features / seconds[:, None], np.ones(len(samples)))
    return EngineModel(
        name=name,
        knot_tokens=tuple(knots),
        knot_s=tuple(np.maximum.accumulate(weights[: len(knots)]).tolist()),
        per_sequence_s=float(weights[-3]),
        per_kv_token_s=float(weights[-2]),
        per_pair_s=float(weights[-1]),
    )


def _features(found: Composition, knots: Sequence[int]) -> list[float]:
    """Weights of the knots at this number of tokens, then the three counts."""
    hats = [0.0] * len(knots)
    above = min(max(bisect_right(knots, found.new_tokens), 1), len(knots) - 1)
    if above == 0:
        hats[0] = 1.0
    else:
        share = (found.new_tokens - knots[above - 1]) / (knots[above] - knots[above - 1])
        hats[above - 1], hats[above] = 1 - share, share
    return [*hats, float(found.sequences), float(found.kv_tokens), float(found.pairs)]


def _non_negative(features: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    kept = np.ones(features.shape[1], dtype=bool)
    while True:
        found = np.zeros(features.shape[1])
        found[kept] = np.linalg.lstsq(features[:, kept] / scale[kept], wanted, rcond=None)[0]
        if found.min() >= 0:
            weights: NDArray[np.float64] = found / scale
            return weights
        kept[found.argmin()] = False


def read_samples(path: Path) -> tuple[list[Sample], Mapping[str, Any]]:
    """What `benchmarks.iteration_profile` measured, and the whole document.

    Raises:
        InvalidConfiguration: the file cannot be read or has another form.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            Sample(tuple(Part(*map(int, part)) for part in row["parts"]), float(row["seconds"]))
            for row in document["samples"]
        ]
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}", param="--profile") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidConfiguration(
            f"{path} is no profile: measure one with `python -m benchmarks.iteration_profile` ({error})",
            param="--profile",
        ) from error
    return samples, document


def from_file(path: Path) -> EngineModel:
    """The model of a machine measured by `benchmarks.iteration_profile`.

    Raises:
        InvalidConfiguration: the file cannot be read, has another form or too few samples.
    """
    samples, document = read_samples(path)
    try:
        return replace(
            fitted(samples, name=str(document.get("variant", path.stem))),
            kv_bytes_per_token=int(document.get("kv_bytes_per_token", 0)),
            link_bytes_per_s=float(document.get("copy_bytes_per_s", 25e9)),
            layers=int(document.get("layers", 1)),
        )
    except (TypeError, ValueError) as error:
        raise InvalidConfiguration(f"{path}: {error}", param="--profile") from error
