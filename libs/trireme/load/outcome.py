"""What became of one request, as the client saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol


class ReportedUsage(Protocol):
    """Usage as the wire or the client gives it."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def joules(self) -> float: ...
    @property
    def grams_co2e(self) -> float: ...


@dataclass(slots=True)
class Outcome:
    """Times are seconds on the driver's monotonic clock; `started_s` is when it was sent."""

    index: int
    started_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(when, how many tokens came then)."""
    ended_s: float = 0.0
    error: str | None = None
    """Stable code of the failure; None where it succeeded."""
    retry_after_s: float | None = None
    """When a refused client was told to come back."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    joules: float = 0.0
    grams_co2e: float = 0.0
    text: str = ""
    paused_s: float = 0.0
    pauses: int = 0

    def note_usage(self, usage: ReportedUsage) -> None:
        """Take over what the fleet says was used."""
        self.prompt_tokens = usage.prompt_tokens
        self.cached_tokens = usage.cached_prompt_tokens
        self.answer_tokens = usage.completion_tokens
        self.joules = usage.joules
        self.grams_co2e = usage.grams_co2e

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.arrivals[0][0] - self.started_s if self.arrivals else None

    @property
    def e2e_s(self) -> float:
        """From sending to the end."""
        return self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last arrival - first arrival) / (tokens - 1)."""
        ttft_s = self.ttft_s
        if ttft_s is None or self.answer_tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.answer_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Inter-token latency: gaps between arrivals; tokens that came together share a gap's arrival."""
        times = [when for when, _ in self.arrivals]
        return [later - earlier for earlier, later in pairwise(times)]
