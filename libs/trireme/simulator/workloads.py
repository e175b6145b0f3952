"""Generated requests: when they arrive, and how long they are. All from one seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trireme.errors import InvalidConfiguration
from trireme.simulator.requests import TICK_S, Request

Lengths = Callable[[np.random.Generator, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""(rng, count) -> prompt tokens and answer tokens, each (count,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalMix:
    """Prompt and answer lengths, independent, lognormal and cut at a longest one."""

    prompt_mean: float
    """Of the uncut distribution, tokens."""
    prompt_sigma: float
    """Standard deviation of the logarithm."""
    answer_mean: float
    answer_sigma: float
    longest: int

    def __call__(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return (
            self._draw(rng, count, self.prompt_mean, self.prompt_sigma),
            self._draw(rng, count, self.answer_mean, self.answer_sigma),
        )

    def _draw(self, rng: np.random.Generator, count: int, mean: float, sigma: float) -> NDArray[np.int64]:
        drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


SHAREGPT_LIKE: Final = LognormalMix(
    prompt_mean=161, prompt_sigma=1.2, answer_mean=338, answer_sigma=1.0, longest=2048
)
"""Means of ShareGPT after Kwon et al., SOSP 2023, section 6.1; the spread is our choice."""
ALPACA_LIKE: Final = LognormalMix(
    prompt_mean=19, prompt_sigma=0.5, answer_mean=58, answer_sigma=1.0, longest=2048
)
"""Means of Alpaca after the same; the spread of answers is about that of its first rows."""
MIXES: Final = {"sharegpt-like": SHAREGPT_LIKE, "alpaca-like": ALPACA_LIKE}


def sampled_lengths(requests: Sequence[Request]) -> Lengths:
    """Length pairs of recorded requests, drawn with replacement."""
    pairs = np.array([(request.prompt_tokens, request.answer_tokens) for request in requests], dtype=np.int64)

    def draw(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = pairs[rng.integers(0, len(pairs), count)]
        return rows[:, 0], rows[:, 1]

    return draw


def ratio_of_means(ratio: float, *, mean_tokens: float, sigma: float, longest: int = 4096) -> LognormalMix:
    """Prompts `ratio` times as long as answers on average, each drawn by itself.

    Args:
        mean_tokens: of prompt and answer together; the answer has 2 at least.
    """
    answer_mean = max(2.0, mean_tokens / (1 + ratio))
    return LognormalMix(
        prompt_mean=ratio * answer_mean,
        prompt_sigma=sigma,
        answer_mean=answer_mean,
        answer_sigma=sigma,
        longest=longest,
    )


def generate(*, count: int, rate_rps: float, lengths: Lengths, seed: int, cv: float = 1.0) -> list[Request]:
    """Requests with independent gaps.

    Args:
        rate_rps: mean arrivals per second.
        cv: coefficient of variation of the gaps: 1 is Poisson; larger is burstier (Gamma).

    Raises:
        InvalidConfiguration: `count`, `rate_rps` or `cv` is not positive.
    """
    for name, value in (("count", count), ("rate", rate_rps), ("cv", cv)):
        if not 0 < value < math.inf:
            raise InvalidConfiguration(f"{name} is {value}; it must be positive", param=name)
    gaps_rng, lengths_rng = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(2))
    shape = 1 / cv**2
    gaps = gaps_rng.gamma(shape, 1 / (rate_rps * shape), count)
    arrivals = np.rint(np.cumsum(gaps) / TICK_S) * TICK_S
    prompts, answers = lengths(lengths_rng, count)
    return [
        Request(f"r{index}", arrival_s, prompt, answer)
        for index, (arrival_s, prompt, answer) in enumerate(
            zip(arrivals.tolist(), prompts.tolist(), answers.tolist(), strict=True)
        )
    ]
