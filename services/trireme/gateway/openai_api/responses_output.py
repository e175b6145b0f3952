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
from trireme.wire.inference.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
)


class Output:
    """Reads an answer's one choice by token.

    Deltas merge what came meanwhile, so that their borders depend on time. Entries do not: one for
    each token, and one for the text that was held back at the end, if there is any.
    """

    def __init__(self, answer: Answer, vocabulary: Vocabulary) -> None:
        self._choice = answer.live.choices[0]
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
        entries = [Entry(texts[index], self._rows(index)) for index in range(self._taken, len(texts))]
        self._taken = len(texts)
        if choice.ended and not self._tail_taken:
            self._tail_taken = True
            if choice.tail:
                entries.append(Entry(choice.tail))
        return entries

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
        if self._choice.reason == FINISH_REASON_LENGTH:
            return End(status="incomplete", usage=usage, incomplete_details={"reason": "max_output_tokens"})
        return End(status="completed", usage=usage, completed_at=int(time.time()))


def failed(error: TriremeError) -> End:
    """The end of a response that could not be given."""
    if isinstance(error, RequestCancelled):
        return End(status="cancelled")
    code = "rate_limit_exceeded" if error.kind is Kind.EXHAUSTED else "server_error"
    if error.kind is Kind.INVALID:
        code = "invalid_prompt"
    return End(status="failed", error={"code": code, "message": error.message})
