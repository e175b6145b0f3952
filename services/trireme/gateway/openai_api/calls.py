"""One HTTP call: its answers, merged, as one JSON document or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from trireme.errors import TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.events import Accepted, ChoiceFinished, Delta, Event, Paused, Summary
from trireme.gateway.openai_api.errors import error_event
from trireme.gateway.openai_api.shapes import ChoiceParts, Frame, Shape, finish_reason, usage_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the handlers prepared."""

    shape: Shape
    frame: Frame
    answers: Sequence[Answer]
    choices_each: int
    """Choices per answer: choice c of answer a has the index a * choices_each + c."""
    with_usage: bool
    request_id: str
    """As the client knows it."""


async def whole_document(call: Call) -> dict[str, Any]:
    """Wait for the end and return all of it.

    Raises:
        TriremeError: the request cannot be answered.
    """
    parts = [ChoiceParts() for _ in range(len(call.answers) * call.choices_each)]
    summaries: dict[int, Summary] = {}
    for answer in call.answers:
        answer.hear_only_the_end()
    for index in range(len(parts)):
        call.shape.opening(index, parts[index])
    async for number, events in _merged(call.answers, timeout_s=None):
        for event in events:
            if isinstance(event, Delta):
                index = number * call.choices_each + event.choice
                call.shape.collect(index, event, parts[index])
            elif isinstance(event, ChoiceFinished):
                parts[number * call.choices_each + event.choice].finish_reason = finish_reason(event)
            elif isinstance(event, Summary):
                summaries[number] = event
    usage = usage_object([summaries[number] for number in sorted(summaries)])
    return {
        **call.frame.head,
        "object": call.shape.object_name,
        "choices": [call.shape.whole(index, part) for index, part in enumerate(parts)],
        "usage": usage,
        "system_fingerprint": None,
    }


async def whole_answer(call: Call) -> web.Response:
    """The whole answer as a response.

    Raises:
        TriremeError: the request cannot be answered.
    """
    document = await whole_document(call)
    extras = document["usage"]["trireme"]
    headers = {
        "x-request-id": call.request_id,
        "x-trireme-variant": extras["variant"],
        "x-trireme-worker": extras["worker"],
        "x-trireme-joules": f"{extras['joules']:.6g}",
        "x-trireme-grams-co2e": f"{extras['grams_co2e']:.6g}",
    }
    return web.json_response(document, headers=headers)


async def streamed_answer(
    request: web.Request, call: Call, *, ping_s: float, stall_s: float
) -> web.StreamResponse:
    """Send the answer as it comes; the status is sent with the first token, or the first ping.

    Raises:
        TriremeError: the request cannot be answered, and nothing was sent yet.
    """
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            "x-request-id": call.request_id,
        }
    )
    parts = [ChoiceParts() for _ in range(len(call.answers) * call.choices_each)]
    summaries: dict[int, Summary] = {}

    async def send(data: bytes, *, last: bool = False) -> None:
        if not response.prepared:
            await response.prepare(request)
        async with asyncio.timeout(stall_s):
            await response.write(data)
            if last:
                await response.write_eof()

    try:
        async for number, events in _merged(call.answers, timeout_s=ping_s):
            if not events:
                await send(b": ping\n\n")
                continue
            data = _render(call, parts, summaries, number, events)
            if data:
                await send(data.encode())
        ending = "data: [DONE]\n\n"
        if call.with_usage:
            usage = usage_object([summaries[number] for number in sorted(summaries)])
            ending = call.frame.usage_chunk(usage) + ending
        await send(ending.encode(), last=True)
    except TriremeError as error:
        if not response.prepared:
            raise
        with suppress(ConnectionError, TimeoutError):
            await send(error_event(error), last=True)
    except (ConnectionError, TimeoutError):
        if not response.prepared:
            raise
        if request.transport is not None:
            request.transport.abort()  # Or the server would wait for it to take what is buffered.
    return response


def _render(
    call: Call, parts: list[ChoiceParts], summaries: dict[int, Summary], number: int, events: list[Event]
) -> str:
    shape, chunk = call.shape, call.frame.chunk
    lines: list[str] = []
    for event in events:
        match event:
            case Delta():
                call.frame.count(answer_tokens=len(event.token_ids))
                index = number * call.choices_each + event.choice
                part = parts[index]
                if not part.opened:
                    _open(call, lines, index, part)
                if event.text or event.logprobs or event.prompt_logprobs:
                    piece = shape.piece(index, event, part)
                    if piece:
                        lines.append(chunk(piece))
            case ChoiceFinished():
                index = number * call.choices_each + event.choice
                part = parts[index]
                if not part.opened:
                    _open(call, lines, index, part)
                part.finish_reason = finish_reason(event)
                lines.append(chunk(shape.ending(index, part)))
            case Summary():
                summaries[number] = event
            case Paused():
                lines.append(f": paused: {event.reason}\n\n")
            case Accepted():
                call.frame.count(prompt_tokens=event.prompt_tokens)
    return "".join(lines)


def _open(call: Call, lines: list[str], index: int, part: ChoiceParts) -> None:
    part.opened = True
    opening = call.shape.opening(index, part)
    if opening is not None:
        lines.append(call.frame.chunk(opening))


async def _merged(
    answers: Sequence[Answer], *, timeout_s: float | None
) -> AsyncIterator[tuple[int, list[Event]]]:
    """The events of all answers with the answer's number; no events after `timeout_s` of silence."""
    if len(answers) == 1:
        answer = answers[0]
        while not answer.delivered:
            yield 0, await answer.news(timeout_s=timeout_s)
        return
    reading = {asyncio.create_task(answer.news()): number for number, answer in enumerate(answers)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield 0, []
            for task in done:
                number = reading.pop(task)
                yield number, task.result()
                if not answers[number].delivered:
                    reading[asyncio.create_task(answers[number].news())] = number
    finally:
        for task in reading:
            task.cancel()
