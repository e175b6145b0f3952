"""The JSON of chats whose answers may call tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Delta
from trireme.gateway.openai_api.bodies import ChatBody
from trireme.gateway.openai_api.shapes import ChatShape, ChoiceParts
from trireme.gateway.openai_api.tool_bodies import ChosenTool
from trireme.gateway.openai_api.tool_reading import CallPart, Form, News, ToolReader

ReaderOf = Callable[[], ToolReader]


def reader_for(body: ChatBody, form: Form) -> ReaderOf | None:
    """What reads the answers to a body; None: they call nothing.

    Args:
        form: how the model writes calls by itself.
    """
    choice = body.tool_choice
    if not body.tools or choice == "none":
        return None
    names = [tool.function.name for tool in body.tools]
    if isinstance(choice, ChosenTool):
        form, names = Form.ARGUMENTS, [choice.function.name]
    elif choice == "required":
        form = Form.WHOLE
    several = body.parallel_tool_calls is not False
    return lambda: ToolReader(form, names, several=several)


class ToolShape(ChatShape):
    """`chat.completion` with calls."""

    def __init__(
        self, vocabulary: Vocabulary, *, with_logprobs: bool, reader: ReaderOf, request_id: str
    ) -> None:
        super().__init__(vocabulary, with_logprobs=with_logprobs)
        self._reader_of = reader
        self._readers: dict[int, ToolReader] = {}
        self._request_id = request_id

    def piece(self, index: int, delta: Delta, parts: ChoiceParts) -> str:
        news = self._reader(index).push(delta.text)
        logprobs = {"content": self._rows(delta), "refusal": None} if self._with_logprobs else None
        if not (news.content or news.calls or logprobs):
            return ""
        return _chunk(index, self._delta(index, news), logprobs, None)

    def ending(self, index: int, parts: ChoiceParts) -> str:
        reader = self._reader(index)
        news = reader.finish()
        return _chunk(index, self._delta(index, news), None, _reason(parts, reader))

    def whole(self, index: int, parts: ChoiceParts) -> dict[str, Any]:
        reader = self._reader(index)
        news = [reader.push("".join(parts.texts)), reader.finish()]
        content = "".join(one.content for one in news)
        calls = whole_calls([part for one in news for part in one.calls], self._request_id, index)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": parts.logprobs, "refusal": None} if self._with_logprobs else None,
            "finish_reason": _reason(parts, reader),
        }

    def _reader(self, index: int) -> ToolReader:
        if index not in self._readers:
            self._readers[index] = self._reader_of()
        return self._readers[index]

    def _delta(self, index: int, news: News) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if news.content:
            delta["content"] = news.content
        if news.calls:
            delta["tool_calls"] = [
                {"index": part.index, "function": {"arguments": part.arguments}}
                if part.name is None
                else {
                    "index": part.index,
                    "id": call_id(self._request_id, index, part.index),
                    "type": "function",
                    "function": {"name": part.name, "arguments": part.arguments},
                }
                for part in news.calls
            ]
        return delta


def whole_calls(parts: list[CallPart], request_id: str, choice: int) -> list[dict[str, Any]]:
    """Calls put together."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.name is not None:
            function = {"name": part.name, "arguments": ""}
            calls.append(
                {"id": call_id(request_id, choice, part.index), "type": "function", "function": function}
            )
        calls[part.index]["function"]["arguments"] += part.arguments
    return calls


def call_id(request_id: str, choice: int, number: int) -> str:
    """The same whenever the answer is read."""
    digest = hashlib.blake2b(f"{request_id}\0{choice}\0{number}".encode(), digest_size=12)
    return f"call_{digest.hexdigest()}"


def _reason(parts: ChoiceParts, reader: ToolReader) -> str | None:
    return "tool_calls" if reader.num_calls and parts.finish_reason == "stop" else parts.finish_reason


def _chunk(index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> str:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return json.dumps(choice, separators=(",", ":"))
