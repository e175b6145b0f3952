"""From a request to sequences: what is refused at once, and why."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from trireme.constraints.guide import Guides
from trireme.engine.context_window import open_window
from trireme.engine.prompt_logprobs import PromptLogprobs
from trireme.engine.request import Mode, SequenceRequest
from trireme.engine.sampling import SamplingState
from trireme.engine.sequence import ScoreGroup, Sequence
from trireme.errors import ContextLengthExceeded, InvalidRequest
from trireme.models.config import ModelConfig
from trireme.models.model import Model


def check(
    request: SequenceRequest, config: ModelConfig, *, max_model_len: int, can_guide: bool = False
) -> None:
    """Refuse what can never be served.

    Args:
        can_guide: constraints can be compiled for the model.

    Raises:
        InvalidRequest: an empty prompt, an unknown token id, a constraint that cannot be compiled here, or
            continuations that are missing or empty.
        ContextLengthExceeded: prompt and what must follow do not fit the context.
    """
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt_token_ids")
    _check_ids("prompt_token_ids", request.prompt_token_ids, config.vocab_size)
    _check_ids("delivered_token_ids", request.delivered_token_ids, config.vocab_size)
    request.sampling.check_vocabulary(config.vocab_size)
    if request.sampling.constraint is not None and not can_guide:
        raise InvalidRequest("this model has no tokenizer to compile constraints with", param="constraint")
    params = request.sampling
    if params.prompt_logprobs is not None and (
        request.mode is not Mode.GENERATE or request.truncation is not None
    ):
        raise InvalidRequest(
            "prompt_logprobs is for a prompt that is answered and not cut", param="prompt_logprobs"
        )
    longest = min(1, params.max_tokens) if request.mode is Mode.GENERATE else 0
    if request.mode is Mode.SCORE:
        if not request.score_continuations:
            raise InvalidRequest("there are no continuations to score", param="score_continuations")
        for continuation in request.score_continuations:
            if not continuation:
                raise InvalidRequest("a continuation has no tokens", param="score_continuations")
            _check_ids("score_continuations", continuation, config.vocab_size)
            longest = max(longest, len(continuation))
    needed = len(request.prompt_token_ids) + longest
    may_be_cut = request.mode is Mode.GENERATE and request.truncation is not None
    if needed > max_model_len and not may_be_cut:
        raise ContextLengthExceeded(
            f"the prompt has {len(request.prompt_token_ids)} tokens and at least {longest} must follow, "
            f"but the context holds {max_model_len}; shorten the prompt",
            param="prompt_token_ids",
        )


def sequences_of(
    request: SequenceRequest,
    model: Model,
    *,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    block_size: int,
    guides: Guides | None = None,
) -> list[Sequence]:
    """One sequence; for SCORE one per continuation, with a group.

    Raises:
        InvalidRequest: cuts that were made before do not fit the blocks.
        ContextLengthExceeded: what every cut must keep leaves no room.
    """
    prompt = list(request.prompt_token_ids)
    if request.mode is not Mode.SCORE:
        sequence = _sequence(request, request.sequence_id, prompt)
        if request.mode is Mode.GENERATE:
            params = request.sampling
            window = open_window(
                request,
                max_model_len=max_model_len,
                block_size=block_size,
                can_rotate=model.key_rotation is not None,
            )
            if window is None:
                sequence.token_ids = [*prompt, *request.delivered_token_ids]
            else:
                sequence.token_ids = window.refilled()
                sequence.chain = window.stage.chain
            sequence.window = window
            sequence.has_no_answer = params.max_tokens == 0
            if params.prompt_logprobs is not None:
                sequence.prompt_logprobs = PromptLogprobs(params.prompt_logprobs)
            sequence.stop_ids = stop_ids(request, eos_token_ids)
            sequence.state = SamplingState(
                params,
                stop_ids=sorted(sequence.stop_ids),
                prompt_ids=prompt,
                output_ids=list(request.delivered_token_ids),
                vocab_size=model.config.vocab_size,
                device=model.device,
                guide=(
                    guides.open(params.constraint, request.delivered_token_ids)
                    if guides is not None and params.constraint is not None
                    else None
                ),
            )
        return [sequence]

    count = len(request.score_continuations)
    group = ScoreGroup(request.sequence_id, [], [0.0] * count, count)
    for index, continuation in enumerate(request.score_continuations):
        member = _sequence(request, f"{request.sequence_id}\0{index}", [*prompt, *continuation])
        member.group, member.member = group, index
        group.members.append(member)
    return list(group.members)


def stop_ids(request: SequenceRequest, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end the request's answer."""
    own = frozenset(request.sampling.stop_token_ids)
    return own if request.sampling.ignore_eos else own | eos_token_ids


def _sequence(request: SequenceRequest, sequence_id: str, token_ids: list[int]) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        mode=request.mode,
        request=request,
        token_ids=token_ids,
        num_prompt=len(request.prompt_token_ids),
        chain=request.chain,
        arrival_s=request.arrival_s,
        priority=request.priority,
    )


def _check_ids(name: str, token_ids: Seq[int], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{name} has token {wrong}, but the model has {vocab_size} tokens", param=name)
