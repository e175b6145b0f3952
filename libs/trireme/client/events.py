"""The events of an answer, as plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from trireme.client.results import Usage, usage_from
from trireme.wire.inference.v1 import inference_pb2 as pb


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float
    text: str
    """Empty where the token is not valid UTF-8 alone."""
    raw: bytes


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token chosen at one position, and the likeliest ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is durable."""

    request_id: str
    prompt_tokens: int
    seed: int
    attached: bool
    """The request existed already: a resumed stream."""
    truncated_tokens: int = 0
    """Prompt tokens that were dropped because they did not fit."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    """Text that became complete with these tokens."""
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    """With a choice's first delta, where asked for: of the prompt's tokens but the first."""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One choice ended."""

    choice: int
    reason: FinishReason
    stop_string: str


@dataclass(frozen=True, slots=True)
class Paused:
    """A fault delays the answer; nothing is lost."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Last event."""

    usage: Usage
    queue_s: float
    first_token_s: float
    total_s: float
    paused_s: float
    variant: str
    worker_id: str
    decision: str
    attempts: int


Event = Accepted | Delta | ChoiceFinished | Paused | Summary


def event_from(response: pb.GenerateResponse) -> Event | None:
    """The event in a response; None for a kind that this client does not know yet."""
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            return Delta(
                delta.choice,
                delta.first_index,
                tuple(delta.token_ids),
                delta.text,
                tuple(_position(position) for position in delta.logprobs),
                tuple(_position(position) for position in delta.prompt_logprobs),
            )
        case "accepted":
            accepted = response.accepted
            return Accepted(
                response.request_id,
                accepted.prompt_tokens,
                accepted.seed,
                accepted.attached,
                accepted.truncated_tokens,
            )
        case "choice_finished":
            finished = response.choice_finished
            reason = _REASONS.get(finished.reason, FinishReason.ERROR)
            return ChoiceFinished(finished.choice, reason, finished.stop_string)
        case "paused":
            return Paused(response.paused.reason)
        case "summary":
            summary = response.summary
            return Summary(
                usage=usage_from(summary.usage),
                queue_s=summary.timings.queue_s,
                first_token_s=summary.timings.first_token_s,
                total_s=summary.timings.total_s,
                paused_s=summary.timings.paused_s,
                variant=summary.variant,
                worker_id=summary.worker_id,
                decision=summary.decision,
                attempts=summary.attempts,
            )
    return None


def _position(position: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(_token(position.chosen), tuple(_token(token) for token in position.top))


def _token(token: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, token.text, token.raw)
