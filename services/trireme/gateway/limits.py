"""What one request may ask for. Everything over a limit is refused by name, before any work.

docs/security.md has the table of all limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trireme.errors import ContextLengthExceeded, InvalidRequest
from trireme.gateway.models import ServedModel
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_prompt_tokens: int = 131072
    max_answer_tokens: int = 32768
    max_choices: int = 16
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    max_prompt_logprobs: int = 65536
    """Of one request: choices times the prompt's tokens, times one and the alternatives beside each."""
    max_messages: int = 2048
    max_prompts: int = 64
    max_embeddings: int = 2048
    max_labels: int = 64
    trimmed: frozenset[str] = frozenset()
    """Models and variants that are behind, by name."""
    trimmed_answer_tokens: int = 512
    """Of those: max_tokens where absent."""


def in_range(param: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless low <= value <= high; NaN is never in range."""
    if not low <= value <= high:
        raise InvalidRequest(f"{param} must be from {low:g} to {high:g}, not {value:g}", param=param)


def at_most(param: str, count: int, limit: int) -> None:
    """Raise InvalidRequest where a list is longer than its limit."""
    if count > limit:
        raise InvalidRequest(f"{param} has {count} entries; at most {limit} are allowed", param=param)


def check_sampling(
    sampling: SamplingParameters,
    model: ServedModel,
    limits: Limits,
    *,
    max_tokens_param: str = "max_tokens",
    logprobs_param: str = "logprobs",
) -> None:
    """Check every field's range; an absent field is in range. Two have other names in other APIs.

    Raises:
        InvalidRequest: names the field.
    """
    in_range("n", sampling.n, 0, limits.max_choices)
    if sampling.HasField("max_tokens"):
        fewest = 0 if sampling.HasField("prompt_logprobs") else 1
        in_range(max_tokens_param, sampling.max_tokens, fewest, limits.max_answer_tokens)
    in_range("min_tokens", sampling.min_tokens, 0, limits.max_answer_tokens)
    if sampling.HasField("temperature"):
        in_range("temperature", sampling.temperature, 0, 2)
    if sampling.HasField("top_p"):
        in_range("top_p", sampling.top_p, 0, 1)
        if sampling.top_p == 0:
            raise InvalidRequest("top_p must be more than 0; for greedy set temperature to 0", param="top_p")
    in_range("min_p", sampling.min_p, 0, 1)
    in_range("presence_penalty", sampling.presence_penalty, -2, 2)
    in_range("frequency_penalty", sampling.frequency_penalty, -2, 2)
    if sampling.HasField("repetition_penalty") and not 0 < sampling.repetition_penalty < math.inf:
        raise InvalidRequest("repetition_penalty must be more than 0", param="repetition_penalty")
    at_most("logit_bias", len(sampling.logit_bias), limits.max_logit_bias)
    for token_id, bias in sampling.logit_bias.items():
        check_token_id("logit_bias", token_id, model)
        in_range("logit_bias", bias, -100, 100)
    if sampling.HasField("logprobs"):
        in_range(logprobs_param, sampling.logprobs, 0, limits.max_logprobs)
    if sampling.HasField("prompt_logprobs"):
        in_range("prompt_logprobs", sampling.prompt_logprobs, 0, limits.max_logprobs)
    at_most("stop", len(sampling.stop), limits.max_stop_strings)
    for stop in sampling.stop:
        if not 0 < len(stop) <= limits.max_stop_characters:
            raise InvalidRequest(
                f"a stop string must have 1 to {limits.max_stop_characters} characters", param="stop"
            )
    at_most("stop_token_ids", len(sampling.stop_token_ids), limits.max_stop_token_ids)
    for token_id in sampling.stop_token_ids:
        check_token_id("stop_token_ids", token_id, model)


def check_token_id(param: str, token_id: int, model: ServedModel) -> None:
    """Raise InvalidRequest unless the id is in the model's vocabulary."""
    if not 0 <= token_id < model.vocabulary_size:
        raise InvalidRequest(
            f"{param}: token id {token_id} is not in {model.name}'s vocabulary of {model.vocabulary_size}",
            param=param,
        )


def check_prompt(
    token_ids: list[int], model: ServedModel, limits: Limits, *, param: str, may_be_cut: bool = False
) -> None:
    """Raise unless the prompt has at least one token, all of the vocabulary, and fits.

    A prompt that may be cut need not fit the context.

    Raises:
        InvalidRequest: it is empty or has a foreign id.
        ContextLengthExceeded: it is too long, or leaves no room for an answer.
    """
    if not token_ids:
        raise InvalidRequest("the prompt is empty: give at least one token", param=param)
    if min(token_ids) < 0 or max(token_ids) >= model.vocabulary_size:
        foreign = next(index for index in token_ids if not 0 <= index < model.vocabulary_size)
        check_token_id(param, foreign, model)
    allowed = limits.max_prompt_tokens
    if not may_be_cut:
        # Behind a prompt there must be room for an answer; an encoder gives none.
        allowed = min(allowed, model.context_tokens - model.generates)
    if len(token_ids) > allowed:
        raise ContextLengthExceeded(
            f"the prompt has {len(token_ids)} tokens; {model.name} takes at most {allowed} here "
            f"(its context is {model.context_tokens})",
            param=param,
        )


def check_prompt_logprobs(sampling: SamplingParameters, prompt_tokens: int, limits: Limits) -> None:
    """Raise InvalidRequest where more log-probabilities of a prompt are asked for than are told."""
    if not sampling.HasField("prompt_logprobs"):
        return
    wanted = max(1, sampling.n) * prompt_tokens * (1 + sampling.prompt_logprobs)
    if wanted > limits.max_prompt_logprobs:
        raise InvalidRequest(
            f"{wanted} log-probabilities of the prompt are asked for, and at most "
            f"{limits.max_prompt_logprobs} are told: shorten the prompt, or ask for fewer alternatives "
            "(logprobs) or choices (n)",
            param="logprobs",
        )


def answer_tokens(
    asked: int | None, prompt_tokens: int, model: ServedModel, limits: Limits, *, param: str
) -> int:
    """How many tokens the answer may have: as asked, or what context and limits leave.

    Raises:
        ContextLengthExceeded: prompt and answer together exceed the context.
    """
    room = model.context_tokens - prompt_tokens
    if asked is None:
        behind = model.name in limits.trimmed
        most = (
            min(limits.trimmed_answer_tokens, limits.max_answer_tokens)
            if behind
            else limits.max_answer_tokens
        )
        return max(1, min(room, most))
    if asked > room:
        raise ContextLengthExceeded(
            f"{prompt_tokens} prompt tokens and {asked} answer tokens exceed {model.name}'s context of "
            f"{model.context_tokens}: ask for at most {room} or shorten the prompt",
            param=param,
        )
    return asked
