"""What callers give: a prompt and how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trireme.errors import InvalidRequest
from trireme.wire.inference.v1 import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation as [{"role": ..., "content": ...}]."""

SLO_CLASSES = {
    "": pb.SLO_CLASS_UNSPECIFIED,
    "interactive": pb.SLO_CLASS_INTERACTIVE,
    "standard": pb.SLO_CLASS_STANDARD,
    "batch": pb.SLO_CLASS_BATCH,
}


CONTEXT_OVERFLOWS = {
    "": pb.CONTEXT_OVERFLOW_UNSPECIFIED,
    "error": pb.CONTEXT_OVERFLOW_ERROR,
    "truncate_oldest": pb.CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    "truncate_pinned": pb.CONTEXT_OVERFLOW_TRUNCATE_PINNED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None leaves the server's default."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    """Alternatives per token; 0: the chosen token only."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; then `max_tokens` may be 0."""
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1

    def to_wire(self) -> pb.SamplingParameters:
        """The same as a message."""
        return pb.SamplingParameters(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            n=self.n,
        )


def slo_class(name: str) -> pb.SloClass.ValueType:
    """The class of that name.

    Raises:
        InvalidRequest: there is none.
    """
    if name not in SLO_CLASSES:
        known = ", ".join(repr(known) for known in SLO_CLASSES)
        raise InvalidRequest(f"slo must be one of {known}, not {name!r}", param="slo")
    return SLO_CLASSES[name]


def context_overflow_mode(name: str) -> pb.ContextOverflow.ValueType:
    """The mode of that name.

    Raises:
        InvalidRequest: there is none.
    """
    if name not in CONTEXT_OVERFLOWS:
        known = ", ".join(repr(known) for known in CONTEXT_OVERFLOWS)
        raise InvalidRequest(
            f"context_overflow must be one of {known}, not {name!r}", param="context_overflow"
        )
    return CONTEXT_OVERFLOWS[name]


def generate_request(
    *,
    request_id: str,
    model: str,
    prompt: Prompt,
    sampling: Sampling,
    session_id: str,
    slo: str,
    priority: int,
    context_overflow: str = "",
    pinned_tokens: int | None = None,
) -> pb.GenerateRequest:
    """The first message of a call.

    Raises:
        InvalidRequest: the prompt mixes kinds, or a class, mode or field has no such value.
    """
    try:
        request = pb.GenerateRequest(
            request_id=request_id,
            model=model,
            sampling=sampling.to_wire(),
            session_id=session_id,
            slo_class=slo_class(slo),
            priority=priority,
            context_overflow=context_overflow_mode(context_overflow),
            pinned_tokens=pinned_tokens,
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif all(isinstance(part, int) for part in prompt):
            request.token_ids.ids.extend(part for part in prompt if isinstance(part, int))
        elif all(isinstance(part, Mapping) for part in prompt):
            request.chat.messages.extend(
                pb.ChatMessage(role=part["role"], content=part["content"])
                for part in prompt
                if isinstance(part, Mapping)
            )
        else:
            raise InvalidRequest("a prompt is text, token ids or messages, not a mixture", param="prompt")
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"a field has a value that cannot be sent: {error}") from error
    return request
