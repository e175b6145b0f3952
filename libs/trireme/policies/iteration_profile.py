"""How long an iteration takes, as the iteration scheduler needs to know it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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
    """Mean over the batch."""
    seconds: float


@dataclass(frozen=True, slots=True)
class IterationProfile:
    """Measured times of iterations."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Iterable[Part], float]]) -> IterationProfile:
        """Those samples that hold one chunk alone or decoding sequences alone."""
        prefill: list[PrefillPoint] = []
        decode: list[DecodePoint] = []
        for parts, seconds in samples:
            told = [Part(*part) for part in parts]
            sequences = sum(part.sequences for part in told)
            if all(part.new_tokens == 1 and part.cached_tokens > 0 for part in told):
                context = sum(part.sequences * (part.cached_tokens + 1) for part in told) // sequences
                decode.append(DecodePoint(sequences, context, seconds))
            elif sequences == 1:
                prefill.append(PrefillPoint(told[0].new_tokens, told[0].cached_tokens, seconds))
        return cls(tuple(prefill), tuple(decode))
