"""From the fields of a body to the fleet's sampling parameters."""

from __future__ import annotations

from trireme.errors import InvalidRequest
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody
from trireme.gateway.openai_api.structure import constraint_in
from trireme.wire.inference.v1.inference_pb2 import (
    CONTEXT_OVERFLOW_ERROR,
    CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    CONTEXT_OVERFLOW_TRUNCATE_PINNED,
    CONTEXT_OVERFLOW_UNSPECIFIED,
    SLO_CLASS_BATCH,
    SLO_CLASS_INTERACTIVE,
    SLO_CLASS_STANDARD,
    SLO_CLASS_UNSPECIFIED,
    ContextOverflow,
    SamplingParameters,
    SloClass,
)

COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where it is absent, as OpenAI has it."""

_CLASSES: dict[str, SloClass.ValueType] = {
    "interactive": SLO_CLASS_INTERACTIVE,
    "standard": SLO_CLASS_STANDARD,
    "batch": SLO_CLASS_BATCH,
}
_TIERS: dict[str, SloClass.ValueType] = {
    "priority": SLO_CLASS_INTERACTIVE,
    "flex": SLO_CLASS_BATCH,
}


_OVERFLOWS: dict[str | None, ContextOverflow.ValueType] = {
    None: CONTEXT_OVERFLOW_UNSPECIFIED,
    "error": CONTEXT_OVERFLOW_ERROR,
    "truncate_oldest": CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    "truncate_pinned": CONTEXT_OVERFLOW_TRUNCATE_PINNED,
}
_TRUNCATIONS = {None: None, "auto": "truncate_pinned", "disabled": "error"}


def context_overflow(body: ChatBody | CompletionBody) -> ContextOverflow.ValueType:
    """What the body wants done where the context overflows.

    Raises:
        InvalidRequest: `truncation` and `context_overflow` say different things.
    """
    named = body.context_overflow
    alias = _TRUNCATIONS[body.truncation] if isinstance(body, ChatBody) else None
    if None not in (named, alias) and named != alias:
        raise InvalidRequest(
            f"give truncation or context_overflow, not two different ones: {alias} and {named}",
            param="truncation",
        )
    return _OVERFLOWS[named or alias]


def slo_class(service_tier: str | None, header: str | None) -> SloClass.ValueType:
    """The class asked for; the header `x-trireme-slo-class` goes before `service_tier`.

    Raises:
        InvalidRequest: the header names no class.
    """
    if header is not None:
        if header not in _CLASSES:
            raise InvalidRequest(
                f"x-trireme-slo-class must be one of {', '.join(_CLASSES)}", param="x-trireme-slo-class"
            )
        return _CLASSES[header]
    return _TIERS.get(service_tier or "", SLO_CLASS_UNSPECIFIED)


def chat_sampling(body: ChatBody) -> SamplingParameters:
    """Sampling for a chat.

    Raises:
        InvalidRequest: fields contradict each other or ask for what is not supported.
    """
    if body.max_tokens not in (None, body.max_completion_tokens) and body.max_completion_tokens is not None:
        raise InvalidRequest(
            "give max_tokens or max_completion_tokens, not two different ones", param="max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.store:
        raise InvalidRequest("store: answers are not stored; leave it out", param="store")
    for number, message in enumerate(body.messages):
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(
                f"messages[{number}]: tool_calls are an assistant's", param=f"messages[{number}].tool_calls"
            )
        if (message.tool_call_id is None) == (message.role == "tool"):
            raise InvalidRequest(
                f"messages[{number}]: a tool's message names the call that it answers in tool_call_id, "
                "and no other does",
                param=f"messages[{number}].tool_call_id",
            )
        if "content" not in message.model_fields_set and not message.tool_calls:
            raise InvalidRequest("you must provide content", param=f"messages[{number}].content")
        if message.content is None and message.role != "assistant":
            raise InvalidRequest(
                f"messages[{number}]: content may be null for an assistant only",
                param=f"messages[{number}].content",
            )
    sampling = _shared(body)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if asked is not None:
        sampling.max_tokens = asked
    if body.logprobs:
        sampling.logprobs = body.top_logprobs or 0
    return sampling


def completion_sampling(body: CompletionBody) -> SamplingParameters:
    """Sampling for a text completion.

    Raises:
        InvalidRequest: fields contradict each other or ask for what is not supported.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of: only the value of n is supported", param="best_of")
    sampling = _shared(body)
    sampling.max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        sampling.prompt_logprobs = body.logprobs or 0
    return sampling


def _shared(body: ChatBody | CompletionBody) -> SamplingParameters:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    sampling = SamplingParameters(
        min_tokens=body.min_tokens or 0,
        top_k=max(0, body.top_k or 0),  # -1 keeps all, too.
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop=stops,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=body.ignore_eos or False,
        n=body.n or 1,
    )
    for name in ("temperature", "top_p", "repetition_penalty"):
        value = getattr(body, name)
        if value is not None:
            setattr(sampling, name, value)
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    constraint = constraint_in(body)
    if constraint is not None:
        sampling.constraint.CopyFrom(constraint)
    return sampling


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    try:
        parsed = {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError:
        raise InvalidRequest("logit_bias: the keys must be token ids", param="logit_bias") from None
    if len(parsed) < len(biases):
        raise InvalidRequest("logit_bias: two keys are the same token id", param="logit_bias")
    if any(not 0 <= token_id < 2**32 for token_id in parsed):
        raise InvalidRequest("logit_bias: a token id is out of range", param="logit_bias")
    return parsed
