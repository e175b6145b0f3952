"""What a simulation found: times per request, a timeline, counters, and the figures made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from trireme.simulator import sequences

Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The whole fleet at one time."""

    at_s: float
    waiting: int
    """Requests that are not in a batch."""
    running: int
    device_blocks: int
    """Held by sequences."""
    host_blocks: int
    """Of swapped-out sequences."""
    tiers: Mapping[str, int]
    """Bytes by tier, where tiers were simulated."""


@dataclass(slots=True)
class Counters:
    """Of one engine, or summed over several."""

    iterations: int = 0
    decisions: int = 0
    """Asked of the policy: fewer than iterations where time was fast-forwarded."""
    busy_s: float = 0.0
    """Computing."""
    stalled_s: float = 0.0
    """Waiting for copies with nothing to compute."""
    swapped_out: int = 0
    swapped_in: int = 0
    evicted: int = 0
    """Times that KV was dropped, to be computed again."""
    paused: int = 0
    level_changes: int = 0

    @classmethod
    def total(cls, several: Iterable[Counters]) -> Counters:
        """The sum."""
        columns = zip(*(asdict(counters).values() for counters in several), strict=True)
        return cls(*(sum(column) for column in columns))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One simulation. All arrays are (requests,), in order of the requests' scheduled arrival."""

    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt_tokens: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    recomputed_tokens: NDArray[np.int64]
    preemptions: NDArray[np.int64]
    timeline: tuple[Moment, ...]
    counters: Counters

    @classmethod
    def of(
        cls,
        ended: Sequence[sequences.Sequence],
        *,
        timeline: Sequence[Moment],
        counters: Iterable[Counters],
    ) -> Result:
        """Gather what sequences know."""

        def floats(name: str) -> Floats:
            return np.array([getattr(sequence, name) for sequence in ended], dtype=np.float64)

        def ints(values: Iterable[int]) -> NDArray[np.int64]:
            return np.fromiter(values, dtype=np.int64, count=len(ended))

        return cls(
            arrival_s=floats("arrival_s"),
            first_token_s=floats("first_token_s"),
            finish_s=floats("finish_s"),
            prompt_tokens=ints(sequence.request.prompt_tokens for sequence in ended),
            answer_tokens=ints(sequence.request.answer_tokens for sequence in ended),
            cached_tokens=ints(sequence.cached_tokens for sequence in ended),
            recomputed_tokens=ints(sequence.recomputed_tokens for sequence in ended),
            preemptions=ints(sequence.preemptions for sequence in ended),
            timeline=tuple(timeline),
            counters=Counters.total(counters),
        )

    @property
    def jct_s(self) -> Floats:
        """Job completion time: from arrival to the last token."""
        return self.finish_s - self.arrival_s

    @property
    def ttft_s(self) -> Floats:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def per_token_s(self) -> Floats:
        """Normalised latency: completion time per answer token."""
        return self.jct_s / self.answer_tokens

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token."""
        return float(self.finish_s.max() - self.arrival_s.min())

    def figures(self) -> dict[str, float]:
        """The numbers of a report's table: seconds, tokens, counts."""
        figures: dict[str, float] = {"requests": len(self.arrival_s)}
        columns = {"jct_s": self.jct_s, "ttft_s": self.ttft_s, "per_token_s": self.per_token_s}
        for name, values in columns.items():
            figures[f"{name}_mean"] = float(values.mean())
            for share in PERCENTILES:
                figures[f"{name}_p{share}"] = float(np.percentile(values, share))
            figures[f"{name}_max"] = float(values.max())
        figures["makespan_s"] = self.makespan_s
        figures["answer_tokens_per_s"] = float(self.answer_tokens.sum() / self.makespan_s)
        figures["cached_token_share"] = float(self.cached_tokens.sum() / self.prompt_tokens.sum())
        figures["preempted_requests"] = int((self.preemptions > 0).sum())
        figures["recomputed_tokens"] = int(self.recomputed_tokens.sum())
        figures.update(asdict(self.counters))
        return figures
