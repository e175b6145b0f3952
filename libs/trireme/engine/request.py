"""What the engine is asked to do with one sequence."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.engine.sampling_params import SamplingParams


class Mode(enum.Enum):
    """What is wanted of the sequence."""

    GENERATE = "generate"
    """An answer, token by token."""
    SCORE = "score"
    """How likely each of the given continuations is."""
    EMBED = "embed"
    """One vector for the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One sequence. An answer with n choices is n sequences; they share the prompt's blocks."""

    sequence_id: str
    """Unique among the sequences that the engine has."""
    prompt_token_ids: Sequence[int]
    delivered_token_ids: Sequence[int] = ()
    """The answer's tokens that were delivered before a re-assignment: it goes on after them, as
    if it had never stopped."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    salt: bytes = b""
    """Root of the block hashes: sequences with different ones share nothing."""
    priority: int = 0
    """Larger goes first, under the priority policy."""
    urgency: int = 0
    """Under the mlfq policy, levels that it joins above (below, if negative) the one its length tells."""
    arrival_s: float | None = None
    """When the request came, on the engine's clock; None: when the engine first sees it."""
    mode: Mode = Mode.GENERATE
    score_continuations: Sequence[Sequence[int]] = ()
    """For SCORE: token ids that might follow the prompt."""
