"""The JSON of chat and text completions: whole, and in chunks.

Chunks are put together from a fixed frame and the one string that differs, since there is one for
every few tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trireme.errors import RequestCancelled
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import ChoiceFinished, Delta, Summary
from trireme.wire.inference.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FinishReason,
)

LEAST_LOGPROB = -9999.0
"""What stands for a token that could not come at all: JSON has no infinity."""
_FINISH_REASONS = {FINISH_REASON_STOP: "stop", FINISH_REASON_LENGTH: "length"}


@dataclass(slots=True)
class ChoiceParts:
    """What one choice has shown so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0
    """Characters shown."""
    opened: bool = False
    echoed: bool = False
    """The prompt was shown."""


class Shape(Protocol):
    """How one kind of completion looks."""

    object_name: str
    chunk_object_name: str
    id_prefix: str

    def opening(self, index: int, parts: ChoiceParts) -> str | None:
        """The choice of the first chunk, if it differs from the others."""
        ...

    def piece(self, index: int, delta: Delta, parts: ChoiceParts) -> str:
        """The choice of a chunk with new tokens; empty where there is nothing to show yet."""
        ...

    def ending(self, index: int, parts: ChoiceParts) -> str:
        """The choice of the last chunk."""
        ...

    def collect(self, index: int, delta: Delta, parts: ChoiceParts) -> None:
        """Keep new tokens for the whole answer."""
        ...

    def whole(self, index: int, parts: ChoiceParts) -> dict[str, Any]:
        """The choice of the whole answer."""
        ...


class ChatShape:
    """`chat.completion`."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs

    def opening(self, index: int, parts: ChoiceParts) -> str | None:
        return (
            f'{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            '"logprobs":null,"finish_reason":null}'
        )

    def piece(self, index: int, delta: Delta, parts: ChoiceParts) -> str:
        logprobs = "null"
        if self._with_logprobs:
            logprobs = json.dumps({"content": self._rows(delta), "refusal": None})
        return (
            f'{{"index":{index},"delta":{{"content":{json.dumps(delta.text)}}},'
            f'"logprobs":{logprobs},"finish_reason":null}}'
        )

    def ending(self, index: int, parts: ChoiceParts) -> str:
        reason = json.dumps(parts.finish_reason)
        return f'{{"index":{index},"delta":{{}},"logprobs":null,"finish_reason":{reason}}}'

    def collect(self, index: int, delta: Delta, parts: ChoiceParts) -> None:
        parts.texts.append(delta.text)
        if self._with_logprobs:
            parts.logprobs.extend(self._rows(delta))

    def whole(self, index: int, parts: ChoiceParts) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(parts.texts), "refusal": None},
            "logprobs": {"content": parts.logprobs, "refusal": None} if self._with_logprobs else None,
            "finish_reason": parts.finish_reason,
        }

    def _rows(self, delta: Delta) -> list[dict[str, Any]]:
        return logprob_rows(self._vocabulary, delta.logprobs)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is shown before its answer."""

    text: str = ""
    token_ids: Sequence[int] = ()


class TextShape:
    """`text_completion`."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, vocabulary: Vocabulary, *, with_logprobs: bool, echoes: Sequence[Echo]) -> None:
        """`echoes`: by choice, the prompt to begin with; empty where it was not asked for."""
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._echoes = echoes

    def opening(self, index: int, parts: ChoiceParts) -> str | None:
        echo = self._echo(index)
        if self._with_logprobs or not echo.text:
            return None  # Its log-probabilities come with the first piece.
        return f'{{"index":{index},"text":{json.dumps(echo.text)},"logprobs":null,"finish_reason":null}}'

    def piece(self, index: int, delta: Delta, parts: ChoiceParts) -> str:
        text, logprobs = delta.text, "null"
        if self._with_logprobs:
            columns = self._shown_prompt(index, delta.prompt_logprobs, parts)
            if columns["tokens"]:
                text = self._echo(index).text + text
            logprobs = json.dumps(_joined([columns, self._columns(delta, parts)]))
        elif not text:
            return ""
        return f'{{"index":{index},"text":{json.dumps(text)},"logprobs":{logprobs},"finish_reason":null}}'

    def ending(self, index: int, parts: ChoiceParts) -> str:
        text, logprobs = "", "null"
        if self._with_logprobs:
            columns = self._shown_prompt(index, (), parts)
            if columns["tokens"]:  # A prompt of one token, and no answer: nothing came before.
                text, logprobs = self._echo(index).text, json.dumps(columns)
        reason = json.dumps(parts.finish_reason)
        return f'{{"index":{index},"text":{json.dumps(text)},"logprobs":{logprobs},"finish_reason":{reason}}}'

    def collect(self, index: int, delta: Delta, parts: ChoiceParts) -> None:
        parts.texts.append(delta.text)
        if self._with_logprobs:
            parts.logprobs.append(self._shown_prompt(index, delta.prompt_logprobs, parts))
            parts.logprobs.append(self._columns(delta, parts))

    def whole(self, index: int, parts: ChoiceParts) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs:
            logprobs = _joined([*parts.logprobs, self._shown_prompt(index, (), parts)])
        return {
            "index": index,
            "text": self._echo(index).text + "".join(parts.texts),
            "logprobs": logprobs,
            "finish_reason": parts.finish_reason,
        }

    def _echo(self, index: int) -> Echo:
        return self._echoes[index] if index < len(self._echoes) else Echo()

    def _shown_prompt(self, index: int, positions: Sequence[Any], parts: ChoiceParts) -> dict[str, Any]:
        """The prompt's columns, the first time; `positions` are those of its tokens but the first."""
        echo = self._echo(index)
        if parts.echoed or not echo.token_ids:
            return {name: [] for name in _COLUMNS}
        parts.echoed = True
        parts.offset = len(echo.text)
        detokenizer = self._vocabulary.detokenizer(())
        offsets, offset = [], 0
        for token_id in echo.token_ids:
            offsets.append(offset)
            offset += len(detokenizer.push(token_id))
        columns = self._rows(positions)
        return {
            "tokens": [self._vocabulary.piece(token_id)[0] for token_id in echo.token_ids],
            "token_logprobs": [None, *columns["token_logprobs"]],
            "top_logprobs": [None, *columns["top_logprobs"]],
            "text_offset": offsets,
        }

    def _columns(self, delta: Delta, parts: ChoiceParts) -> dict[str, Any]:
        offsets = []
        for text in delta.token_texts[: len(delta.token_ids)]:
            offsets.append(parts.offset)
            parts.offset += len(text)
        return {**self._rows(delta.logprobs), "text_offset": offsets}

    def _rows(self, positions: Sequence[Any]) -> dict[str, Any]:
        piece = self._vocabulary.piece
        return {
            "tokens": [piece(position.chosen.token_id)[0] for position in positions],
            "token_logprobs": [max(position.chosen.logprob, LEAST_LOGPROB) for position in positions],
            "top_logprobs": [
                {piece(token.token_id)[0]: max(token.logprob, LEAST_LOGPROB) for token in position.top}
                for position in positions
            ],
        }


_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row for part in parts for row in part[name]] for name in _COLUMNS}


class Frame:
    """What is equal in all chunks of a call, and with `counts_along` the tokens so far."""

    def __init__(
        self,
        shape: Shape,
        *,
        call_id: str,
        created: int,
        model: str,
        with_usage: bool,
        counts_along: bool = False,
    ) -> None:
        self.head = {"id": shape.id_prefix + call_id, "created": created, "model": model}
        opening = json.dumps({**self.head, "object": shape.chunk_object_name}, separators=(",", ":"))
        self._before = f'data: {opening[:-1]},"choices":['
        self._after = '],"usage":null}\n\n' if with_usage else "]}\n\n"
        self._counts_along = counts_along
        self._prompt_tokens = self._answer_tokens = 0

    def count(self, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """More tokens of the call, for the chunks from now on."""
        if self._counts_along:
            self._prompt_tokens += prompt_tokens
            self._answer_tokens += answer_tokens
            prompt, answer = self._prompt_tokens, self._answer_tokens
            self._after = (
                f'],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{answer},'
                f'"total_tokens":{prompt + answer}}}}}\n\n'
            )

    def chunk(self, choice: str) -> str:
        """One event of the stream."""
        return f"{self._before}{choice}{self._after}"

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        """The extra event with the totals."""
        return f'{self._before}],"usage":{json.dumps(usage)}}}\n\n'


def logprob_rows(vocabulary: Vocabulary, positions: Sequence[Any]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and alternatives, as chats and responses show them."""

    def row(token: Any) -> dict[str, Any]:
        text, raw = vocabulary.piece(token.token_id)
        return {"token": text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(raw)}

    return [
        {**row(position.chosen), "top_logprobs": [row(token) for token in position.top]}
        for position in positions
    ]


def finish_reason(event: ChoiceFinished) -> str:
    """OpenAI's word.

    Raises:
        RequestCancelled: another call cancelled the request.
    """
    if event.reason == FINISH_REASON_CANCELLED:
        raise RequestCancelled("the request was cancelled")
    return _FINISH_REASONS.get(event.reason) or FinishReason.Name(event.reason)


def usage_object(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The totals of a call; what is not OpenAI's stands under `trireme`."""
    prompt = sum(summary.prompt_tokens for summary in summaries)
    completion = sum(summary.completion_tokens for summary in summaries)
    first = summaries[0]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(summary.cached_prompt_tokens for summary in summaries)
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
        "trireme": {
            "truncated_tokens": sum(summary.truncated_tokens for summary in summaries),
            "joules": sum(summary.joules for summary in summaries),
            "grams_co2e": sum(summary.grams_co2e for summary in summaries),
            "engine_s": sum(summary.engine_s for summary in summaries),
            "queue_s": max(summary.queue_s for summary in summaries),
            "first_token_s": min(summary.first_token_s for summary in summaries),
            "total_s": max(summary.total_s for summary in summaries),
            "paused_s": max(summary.paused_s for summary in summaries),
            "variant": first.variant,
            "worker": first.worker_id,
            "decision": first.decision,
            "attempts": max(summary.attempts for summary in summaries),
        },
    }
