"""Classify and Embed: requests whose answer is a few numbers, on the same path as generation."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from trireme.errors import InvalidRequest, RequestFailed
from trireme.gateway.events import Summary
from trireme.gateway.generation import Generation
from trireme.gateway.limits import check_prompt
from trireme.gateway.live_request import LiveRequest
from trireme.gateway.models import ServedModel
from trireme.gateway.submission import Caller, Submission, with_class
from trireme.wire.bus.v1.facts_pb2 import RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters

EMBEDDED_AT_ONCE = 64
"""Texts of one call that are in the fleet at a time."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label: the sum (or mean) of its tokens' log-probabilities, and its share."""

    label: str
    logprob: float
    probability: float


async def classify(
    core: Generation,
    caller: Caller,
    model: ServedModel,
    *,
    text: str,
    labels: Sequence[str],
    normalise_length: bool,
) -> tuple[list[LabelScore], Summary]:
    """Score each label as a continuation of the text, or as a class of an encoder; best first.

    Raises:
        InvalidRequest: too few or too many labels, doubled or empty ones, or none of the encoder's.
        ContextLengthExceeded: text and longest label do not fit.
    """
    limit = core.limits.max_labels
    if not 2 <= len(labels) <= limit:
        raise InvalidRequest(f"labels must have 2 to {limit} entries, not {len(labels)}", param="labels")
    if len(set(labels)) != len(labels):
        raise InvalidRequest("labels must differ from each other", param="labels")
    prompt = await model.tokenize(text, param="text")
    if not model.generates:
        check_prompt(prompt, model, core.limits, param="text")
        classes = tuple([[number] for number in model.classes_of(labels)])
        return await _scored(core, caller, model, prompt, labels, classes, normalise_length)
    continuations = []
    for label in labels:
        continuation = await _continuation(model, prompt, text, label)
        if not continuation:
            raise InvalidRequest(f"label {label!r} has no tokens", param="labels")
        check_prompt(prompt + continuation, model, core.limits, param="text")
        continuations.append(continuation)
    check_prompt(prompt, model, core.limits, param="text")
    return await _scored(core, caller, model, prompt, labels, tuple(continuations), normalise_length)


async def _scored(
    core: Generation,
    caller: Caller,
    model: ServedModel,
    prompt: list[int],
    labels: Sequence[str],
    continuations: tuple[list[int], ...],
    normalise_length: bool,
) -> tuple[list[LabelScore], Summary]:
    live, summary = await _ask(
        core, caller, model, RequestKind.REQUEST_KIND_SCORE, prompt, continuations=continuations
    )
    if len(live.scores) != len(labels) or not all(map(math.isfinite, live.scores)):
        raise RequestFailed("the worker did not score every label")
    lengths = [len(ids) if normalise_length else 1 for ids in continuations]
    scores = [score / length for score, length in zip(live.scores, lengths, strict=True)]
    best = max(scores)
    shares = [math.exp(score - best) for score in scores]
    rows = [
        LabelScore(label, score, share / sum(shares))
        for label, score, share in zip(labels, scores, shares, strict=True)
    ]
    return sorted(rows, key=lambda row: row.logprob, reverse=True), summary


async def embed(
    core: Generation,
    caller: Caller,
    model: ServedModel,
    texts: Sequence[str | Sequence[int]],
    *,
    param: str = "texts",
) -> tuple[list[tuple[float, ...]], list[Summary]]:
    """One vector per text, in order; the texts are separate requests on the bus.

    Args:
        texts: texts, or their token ids.

    Raises:
        InvalidRequest: no texts, too many, or an empty one.
        ContextLengthExceeded: a text is too long.
    """
    limit = core.limits.max_embeddings
    if not 1 <= len(texts) <= limit:
        raise InvalidRequest(f"{param} must have 1 to {limit} entries, not {len(texts)}", param=param)
    prompts = []
    for text in texts:
        prompts.append(await model.tokenize(text, param=param) if isinstance(text, str) else list(text))
        check_prompt(prompts[-1], model, core.limits, param=param)
        await asyncio.sleep(0)  # Other requests' tokens go on flowing.
    places = asyncio.Semaphore(EMBEDDED_AT_ONCE)

    async def one(number: int, prompt: list[int]) -> tuple[LiveRequest, Summary]:
        numbered = replace(caller, request_id=f"{caller.request_id}/{number}")
        async with places:
            return await _ask(core, numbered, model, RequestKind.REQUEST_KIND_EMBED, prompt)

    asked = [asyncio.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
    try:
        answers = await asyncio.gather(*asked)
    finally:
        for task in asked:
            task.cancel()
    vectors = [live.embedding for live, _ in answers]
    if not all(vectors):
        raise RequestFailed("the worker did not embed every text")
    return vectors, [summary for _, summary in answers]


async def _continuation(model: ServedModel, prompt: list[int], text: str, label: str) -> list[int]:
    """The label's tokens as they follow the text, so that a leading space is met as in training."""
    whole = await model.tokenize(text + label)
    if len(whole) > len(prompt) and whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return await model.tokenize(label, special_tokens=False)


async def _ask(
    core: Generation,
    caller: Caller,
    model: ServedModel,
    kind: RequestKind.ValueType,
    prompt: list[int],
    continuations: tuple[list[int], ...] = (),
) -> tuple[LiveRequest, Summary]:
    submission = Submission(
        caller=with_class(caller),
        model=model,
        kind=kind,
        prompt_token_ids=prompt,
        sampling=SamplingParameters(max_tokens=0, seed=0, n=1),
        continuations=continuations,
    )
    with closing(await core.submit(submission)) as answer:
        while True:
            for event in await answer.news():
                if isinstance(event, Summary):
                    return answer.live, event
