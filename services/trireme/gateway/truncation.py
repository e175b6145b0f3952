"""What happens where prompt and answer outgrow the context, as the client wants it.

| mode | what the client gets |
|---|---|
| error (default) | context_length_exceeded |
| truncate_oldest | the oldest tokens go, whole turns of a chat; the first block stays |
| truncate_pinned | the same, but the system prompt, or `pinned_tokens`, stays too |

The rule is `policies.kv_truncation`: a conversation that grows is cut alike turn after turn, so its
KV is found again. The newest turn of a chat is never cut; it is refused where it does not fit alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trireme.errors import ContextLengthExceeded, InvalidRequest
from trireme.gateway.models import ServedModel
from trireme.gateway.turns import Messages, Turns, turns_of
from trireme.policies.kv_truncation import TruncationPlan, TruncationRule, plan_truncation
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.inference.v1.inference_pb2 import (
    CONTEXT_OVERFLOW_ERROR,
    CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    CONTEXT_OVERFLOW_TRUNCATE_PINNED,
    CONTEXT_OVERFLOW_UNSPECIFIED,
    ContextOverflow,
)

CUTTING = (CONTEXT_OVERFLOW_TRUNCATE_OLDEST, CONTEXT_OVERFLOW_TRUNCATE_PINNED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overflow:
    """What one request wants, with what is known of its prompt."""

    cuts: bool = False
    """The prompt may be cut, and it may come to that; else it must fit."""
    pinned_tokens: int = 0
    borders: tuple[int, ...] = ()
    """Where its turns begin."""
    newest: int | None = None
    """Where the one begins that must stay."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt that may be cut, as it came and as it was decided."""

    whole_token_ids: list[int]
    rule: TruncationRule
    plan: TruncationPlan
    borders: tuple[int, ...]


async def overflow_of(
    mode: ContextOverflow.ValueType,
    pinned_tokens: int | None,
    model: ServedModel,
    prompt_token_ids: Sequence[int],
    messages: Messages | None,
    max_tokens: int | None,
    tools: Messages = (),
) -> Overflow:
    """Check what a client asks for, and find the turns of its chat if they matter.

    Args:
        pinned_tokens: as given; None: a chat's system prompt.
        messages: of a chat; None for plain prompts.
        max_tokens: of the answer; None: as many as there is room for.
        tools: functions that the chat may call.

    Raises:
        InvalidRequest: the mode is not known, or the pinned tokens do not go with it or the prompt.
    """
    if mode not in (CONTEXT_OVERFLOW_UNSPECIFIED, CONTEXT_OVERFLOW_ERROR, *CUTTING):
        raise InvalidRequest(f"context_overflow {mode} is not known", param="context_overflow")
    if pinned_tokens is not None:
        if mode != CONTEXT_OVERFLOW_TRUNCATE_PINNED:
            raise InvalidRequest(
                "pinned_tokens needs context_overflow to be truncate_pinned", param="pinned_tokens"
            )
        if not 0 <= pinned_tokens <= len(prompt_token_ids):
            raise InvalidRequest(
                f"pinned_tokens is {pinned_tokens}, but the prompt has {len(prompt_token_ids)} tokens",
                param="pinned_tokens",
            )
    # An answer of open length is left at most half of the context, if it comes to that.
    most = len(prompt_token_ids) + (max_tokens or model.context_tokens // 2)
    if mode not in CUTTING or most <= model.context_tokens:
        return Overflow()
    pinned = pinned_tokens
    turns = Turns(0, (), None)
    if messages is not None:
        turns = await turns_of(model, messages, prompt_token_ids, tools)
        if pinned is None and mode == CONTEXT_OVERFLOW_TRUNCATE_PINNED:
            if turns.system_tokens is None:
                raise InvalidRequest(
                    f"{model.name}'s chat template does not tell where the system prompt ends: "
                    "give pinned_tokens",
                    param="pinned_tokens",
                )
            pinned = turns.system_tokens
    if mode == CONTEXT_OVERFLOW_TRUNCATE_OLDEST:
        pinned = 0
    return Overflow(cuts=True, pinned_tokens=pinned or 0, borders=turns.borders, newest=turns.newest)


def cut_prompt(
    overflow: Overflow, model: ServedModel, prompt_token_ids: list[int], max_tokens: int | None, *, param: str
) -> Cut | None:
    """Decide what goes; None where nothing may.

    Args:
        max_tokens: of the answer; None: as many as there is room for.
        param: the prompt's name in the API, for errors.

    Raises:
        ContextLengthExceeded: the pinned prefix or the newest turn do not fit.
    """
    if not overflow.cuts:
        return None
    try:
        rule = TruncationRule(
            window=model.context_tokens, block_size=model.block_tokens, pinned_tokens=overflow.pinned_tokens
        )
        plan = plan_truncation(
            rule,
            len(prompt_token_ids),
            reserved_tokens=max_tokens or rule.most_reserved,
            borders=overflow.borders,
            protected_from=overflow.newest,
        )
    except ContextLengthExceeded as error:
        raise ContextLengthExceeded(error.message, param=error.param or param) from None
    return Cut(prompt_token_ids, rule, plan, overflow.borders)


def dropped_tokens(admitted: AdmittedRequest) -> int:
    """Prompt tokens that were dropped before the request was admitted."""
    cuts = admitted.truncation.cuts
    return cuts[-1] - admitted.truncation.head_tokens if cuts else 0
