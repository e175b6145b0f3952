"""From a request as it was admitted to the engine's sequences; runs in the engine process."""

from __future__ import annotations

from collections.abc import Iterable

from trireme.constraints.constraint import constraint_of
from trireme.engine import Mode, SamplingParams, SequenceRequest, Truncation
from trireme.errors import InvalidRequest
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters
from trireme.worker.request_chains import supplies_of

_MODES = {
    RequestKind.REQUEST_KIND_GENERATE: Mode.GENERATE,
    RequestKind.REQUEST_KIND_SCORE: Mode.SCORE,
    RequestKind.REQUEST_KIND_EMBED: Mode.EMBED,
}


def sequence_id(request: AdmittedRequest, choice: int) -> str:
    """The engine's name for one choice (or all labels) of one attempt of a request."""
    return f"{request.request_id}#{choice}@{request.attempt}"


URGENCY = (1, 0, -2)
"""Levels of the queue by initial queue: an interactive request goes as one of half its length, one of a
batch as one of four times its length."""


def sequences_of(
    request: AdmittedRequest,
    choices: Iterable[int],
    *,
    initial_queue: int = 1,
    arrival_s: float | None = None,
) -> list[SequenceRequest]:
    """The engine's sequences of some choices of a request.

    Args:
        initial_queue: of the assignment.
        arrival_s: on the engine's clock.

    Raises:
        InvalidRequest: sampling parameters are out of range, or the kind is unknown here.
    """
    mode = _MODES.get(request.kind)
    if mode is None:
        raise InvalidRequest(f"requests of kind {request.kind} are not served", param="kind")
    prompt = list(request.prompt_token_ids)
    joints = tuple([(joint.block, joint.parent) for joint in request.kv_joints])
    truncation = truncation_of(request)
    return [
        SequenceRequest(
            sequence_id=sequence_id(request, choice),
            prompt_token_ids=prompt,
            delivered_token_ids=(
                list(request.delivered[choice].ids) if choice < len(request.delivered) else ()
            ),
            sampling=sampling_of(request.sampling, choice=choice),
            salt=request.kv_salt,
            joints=joints,
            truncation=truncation,
            priority=request.priority,
            urgency=URGENCY[min(initial_queue, len(URGENCY) - 1)],
            arrival_s=arrival_s,
            mode=mode,
            score_continuations=[list(tokens.ids) for tokens in request.continuations],
        )
        for choice in choices
    ]


def truncation_of(request: AdmittedRequest) -> Truncation | None:
    """How the request may be cut where it outgrows the context; None: it must fit."""
    if not request.HasField("truncation"):
        return None
    told = request.truncation
    return Truncation(
        head_tokens=told.head_tokens,
        cuts=tuple(told.cuts),
        borders=tuple(told.turn_borders),
        supplies=supplies_of(request),
    )


def sampling_of(parameters: SamplingParameters, *, choice: int) -> SamplingParams:
    """The engine's form of the wire's sampling parameters; each choice has a seed of its own.

    Raises:
        InvalidRequest: a value is out of range, or the constraint is malformed.
    """
    scores_prompt = parameters.HasField("prompt_logprobs")
    return SamplingParams(
        max_tokens=max(parameters.max_tokens, 0 if scores_prompt else 1),
        min_tokens=parameters.min_tokens,
        temperature=parameters.temperature if parameters.HasField("temperature") else 1.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p if parameters.HasField("top_p") else 1.0,
        min_p=parameters.min_p,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        repetition_penalty=(
            parameters.repetition_penalty if parameters.HasField("repetition_penalty") else 1.0
        ),
        logit_bias=dict(parameters.logit_bias),
        seed=(parameters.seed + choice * 0x9E3779B97F4A7C15) % 2**64,
        logprobs=parameters.logprobs if parameters.HasField("logprobs") else None,
        prompt_logprobs=parameters.prompt_logprobs if scores_prompt else None,
        ignore_eos=parameters.ignore_eos,
        stop_token_ids=tuple(parameters.stop_token_ids),
        constraint=constraint_of(parameters),
    )
