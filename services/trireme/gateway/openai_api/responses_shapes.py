"""The response object and its events, made of what was asked, the output so far and the end.

Pure, and the same whoever makes them: an event's sequence number follows from how many entries of
output lie before it, so that a replay repeats the stream whose place it takes, event by event.

| events | when |
|---|---|
| created; queued where it runs in the background | at once |
| in_progress | it was taken up |
| output_item.added, content_part.added | at the first text |
| output_text.delta | for each token that completed some text |
| output_text.done, content_part.done, output_item.done | at the end, if there is an answer |
| function_call items: added, arguments.delta, arguments.done, done | at the end, one by one |
| completed, incomplete or failed | last; a cancelled response ends as failed, its status says why |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one token added to the output."""

    text: str
    logprobs: Sequence[Json] = ()

    def encoded(self) -> str:
        """As it is stored."""
        return json.dumps([self.text, self.logprobs] if self.logprobs else self.text)

    @classmethod
    def decoded(cls, stored: str) -> Entry:
        found = json.loads(stored)
        return cls(found) if isinstance(found, str) else cls(found[0], found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a response ended."""

    status: str
    """completed, incomplete, failed or cancelled."""
    completed_at: int | None = None
    usage: Json | None = None
    error: Json | None = None
    incomplete_details: Json | None = None
    tool_calls: Sequence[Json] = ()
    """Of the answer, as a chat has them; their text is then no part of the output."""
    text: str | None = None
    """What the answer says besides its tool calls; None: all of its output."""

    def as_json(self) -> Json:
        return {name: getattr(self, name) for name in self.__slots__ if name != "status"}


@dataclass(slots=True)
class EventLog:
    """The events of one response, in their order."""

    shown: Json
    """The response object as it began."""
    next_number: int = 0
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    _begun: bool = False
    _item_open: bool = False

    def opening(self) -> list[Json]:
        """What is said at once."""
        events = [self._event("response.created", response=self.shown)]
        if self.shown["background"]:
            events.append(self._event("response.queued", response=self.shown))
        return events

    def begin(self) -> list[Json]:
        """It was taken up; nothing where that was said before."""
        if self._begun:
            return []
        self._begun = True
        return [self._event("response.in_progress", response={**self.shown, "status": "in_progress"})]

    def add(self, entries: Iterable[Entry]) -> list[Json]:
        """More output."""
        events = self.begin()
        for entry in entries:
            if not entry.text and not entry.logprobs:
                continue
            if not self._item_open:
                events += self._open_item()
            self.texts.append(entry.text)
            self.logprobs.extend(entry.logprobs)
            events.append(
                self._event(
                    "response.output_text.delta",
                    **self._place(),
                    delta=entry.text,
                    logprobs=list(entry.logprobs),
                )
            )
        return events

    def finish(self, end: End) -> list[Json]:
        """The last events."""
        events = self.begin()
        whole = response_object(self.shown, self.texts, self.logprobs, end)
        if end.status in ("completed", "incomplete"):
            for index, item in enumerate(whole["output"]):
                events += self._item_done(index, item)
        name = end.status if end.status in ("completed", "incomplete") else "failed"
        return [*events, self._event(f"response.{name}", response=whole)]

    def _item_done(self, index: int, item: Json) -> list[Json]:
        if item["type"] == "function_call":
            return self._call_done(index, item)
        events = [] if self._item_open else self._open_item()
        part = item["content"][0]
        return [
            *events,
            self._event(
                "response.output_text.done", **self._place(), text=part["text"], logprobs=part["logprobs"]
            ),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _call_done(self, index: int, item: Json) -> list[Json]:
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        arguments = item["arguments"]
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=arguments
            ),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _open_item(self) -> list[Json]:
        self._item_open = True
        item = {**_message(self.shown, "", [], "in_progress"), "content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=_text_part("", [])),
        ]

    def _place(self) -> Json:
        return {"item_id": _item_id(self.shown, "msg"), "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self.next_number, **fields}
        self.next_number += 1
        return event


def response_object(
    shown: Json, texts: Sequence[str], logprobs: Sequence[Json], end: End | None, *, status: str = ""
) -> Json:
    """The response as it stands; while it runs (`end` None) its output is empty."""
    if end is None:
        return {**shown, "status": status or shown["status"]}
    text = "".join(texts) if end.text is None else end.text
    item_status = "completed" if end.status == "completed" else "incomplete"
    output: list[Json] = []
    if text or (end.status in ("completed", "incomplete") and not end.tool_calls):
        output.append(_message(shown, text, logprobs, item_status))
    for number, call in enumerate(end.tool_calls):
        output.append(
            {
                "id": f"{_item_id(shown, 'fc')}_{number}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": item_status,
            }
        )
    return {
        **shown,
        "status": end.status,
        "completed_at": end.completed_at,
        "error": end.error,
        "incomplete_details": end.incomplete_details,
        "output": output,
        "usage": end.usage,
    }


def sse(event: Json) -> bytes:
    """One event on the wire."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def usage_of(usage: Json) -> Json:
    """A chat's totals under the names that a response has for them."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
        "trireme": usage["trireme"],
    }


def _message(shown: Json, text: str, logprobs: Sequence[Json], status: str) -> Json:
    return {
        "id": _item_id(shown, "msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text_part(text, logprobs)],
    }


def _text_part(text: str, logprobs: Sequence[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _item_id(shown: Json, kind: str) -> str:
    return f"{kind}_{shown['id'].removeprefix('resp_')}"
