"""What can happen to an answer, as both front ends see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trireme.wire.inference.v1.inference_pb2 import FinishReason


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is durable. First event."""

    prompt_tokens: int
    seed: int
    attached: bool
    """The request existed already."""
    truncated_tokens: int = 0
    """Prompt tokens that were dropped before."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice, and the text that became complete with them."""

    choice: int
    first_index: int
    token_ids: list[int]
    text: str
    token_texts: list[str]
    """The same text by token."""
    logprobs: list[Any]
    """One PositionLogprobs per token where asked for; texts and bytes are not filled in."""
    prompt_logprobs: Sequence[Any] = ()
    """With the first delta of a choice, where asked for: of the prompt's tokens but the first."""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One choice ended."""

    choice: int
    reason: FinishReason.ValueType
    stop_string: str


@dataclass(frozen=True, slots=True)
class Paused:
    """A fault delays the answer; nothing is lost."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Last event of an answer that came to its end."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    """Tokens delivered, over all choices."""
    truncated_tokens: int
    """Tokens that were dropped because the context was full."""
    engine_s: float
    joules: float
    grams_co2e: float
    queue_s: float
    first_token_s: float
    total_s: float
    paused_s: float
    variant: str
    worker_id: str
    decision: str
    attempts: int


Event = Accepted | Delta | ChoiceFinished | Paused | Summary
