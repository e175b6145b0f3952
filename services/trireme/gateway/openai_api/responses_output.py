"""From an answer in the making to a response's entries and its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from trireme.errors import Kind, RequestCancelled, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Event, Summary
from trireme.gateway.openai_api.responses_shapes import End, Entry, usage_of
from trireme.gateway.openai_api.shapes import logprob_rows, usage_object
from trireme.gateway.openai_api.tool_reading import CallPart
from trireme.gateway.openai_api.tool_shape import ReaderOf, whole_calls
from trireme.wire.inference.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
)


class Output:
    """Reads an answer's one choice by token.

    Deltas merge what came meanwhile, so that their borders depend on time. Entries do not: one for
    each token, and one for the text that was held back at the end, if there is any.
    """

    def __init__(self, answer: Answer, vocabulary: Vocabulary, reader: ReaderOf | None = None) -> None:
        """`reader`: where the answer may call tools; calls are told of at the end."""
        self._choice = answer.live.choices[0]
        self._request_id = answer.live.request_id
        self._reader = None if reader is None else reader()
        self._calls: list[CallPart] = []
        self._vocabulary = vocabulary
        self._taken = 0
        self._tail_taken = False
        self._summary: Summary | None = None

    def hear(self, events: Sequence[Event]) -> None:
        """Keep what only the events say."""
        for event in events:
            if isinstance(event, Summary):
                self._summary = event

    def take(self) -> list[Entry]:
        """What is new since the last call."""
        choice = self._choice
        texts = choice.texts
        places = range(self._taken, len(texts))
        entries = [Entry(self._content(texts[index]), self._rows(index)) for index in places]
        self._taken = len(texts)
        if choice.ended and not self._tail_taken:
            self._tail_taken = True
            tail = self._content(choice.tail, is_last=True)
            if tail:
                entries.append(Entry(tail))
        return entries

    def _content(self, text: str, *, is_last: bool = False) -> str:
        """What of the next piece of text is no call."""
        if self._reader is None:
            return text
        content = ""
        for news in [self._reader.push(text), *([self._reader.finish()] if is_last else [])]:
            content += news.content
            self._calls += news.calls
        return content

    def _rows(self, index: int) -> list[dict[str, Any]]:
        return logprob_rows(self._vocabulary, self._choice.logprobs[index : index + 1])

    def end(self) -> End:
        """How it ended; after the Summary.

        Raises:
            RequestCancelled: another call cancelled the request.
        """
        assert self._summary is not None, "the answer has not come to its end"
        if self._choice.reason == FINISH_REASON_CANCELLED:
            raise RequestCancelled("the request was cancelled")
        usage = usage_of(usage_object([self._summary]))
        calls = whole_calls(self._calls, self._request_id, 0)
        if self._choice.reason == FINISH_REASON_LENGTH:
            why = {"reason": "max_output_tokens"}
            return End(status="incomplete", usage=usage, incomplete_details=why, tool_calls=calls)
        return End(status="completed", usage=usage, completed_at=int(time.time()), tool_calls=calls)


def failed(error: TriremeError) -> End:
    """The end of a response that could not be given."""
    if isinstance(error, RequestCancelled):
        return End(status="cancelled")
    code = "rate_limit_exceeded" if error.kind is Kind.EXHAUSTED else "server_error"
    if error.kind is Kind.INVALID:
        code = "invalid_prompt"
    return End(status="failed", error={"code": code, "message": error.message})
