"""POST /v1/responses: its body, and the chat that it asks for.

A response is a chat with another face: what it says is translated into the body of one, so that
each field means the same in both, and is refused by the same rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trireme.errors import InvalidRequest, TriremeError
from trireme.gateway.openai_api.bodies import MAX_MAP_ENTRIES, ChatBody, Strict, bounded, parse
from trireme.gateway.openai_api.metadata import check_metadata
from trireme.gateway.submission import Caller

LOGPROBS = "message.output_text.logprobs"

Json = dict[str, Any]
_Objects = Annotated[list[Annotated[Json, bounded(MAX_MAP_ENTRIES)]], Field(fail_fast=True)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]


class TextConfig(Strict):
    format: Annotated[Json, bounded(MAX_MAP_ENTRIES)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None
    """Accepted: padding is a server's choice, and none is sent."""


class ResponseBody(Strict):
    """The body. What it shares with a chat is checked as the chat's."""

    model: str
    input: str | _Objects
    instructions: str | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[str, str], bounded(MAX_MAP_ENTRIES)] | None = None
    max_output_tokens: _Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: _Count | None = None
    include: Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    text: TextConfig | None = None
    tools: _Objects | None = None
    tool_choice: str | Annotated[Json, bounded(MAX_MAP_ENTRIES)] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    max_tool_calls: None = None
    conversation: None = None
    prompt: None = None
    reasoning: None = None
    context_management: None = None

    # As chats have them; no part of OpenAI's Responses API.
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Annotated[dict[str, float], bounded(MAX_MAP_ENTRIES)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False


_AS_IN_A_CHAT = (
    "temperature",
    "top_p",
    "truncation",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
    "parallel_tool_calls",
    "stop",
    "seed",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "priority",
)
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "top_logprobs",
}
"""A chat's fields as a response calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """All that does not change of a response: enough to run it, to show it and to go on from it."""

    chat: Json
    """The body of the chat, with its seed: any gateway makes the same request of it."""
    shown: Json
    """The response object as it begins."""
    input_items: list[Json]
    """What this call brought, with ids."""
    messages: list[Json]
    """The conversation up to the answer, without the instructions: what the next response goes on from."""
    caller: Json
    """Fields of `Caller`."""

    def as_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Asked:
        return cls(**data)

    def chat_body(self) -> ChatBody:
        """The chat, checked again: a gateway of another version may know other rules.

        Raises:
            InvalidRequest: it does.
        """
        return parse(ChatBody, json.dumps(self.chat).encode())

    def caller_again(self) -> Caller:
        return Caller(**self.caller)


def response_id_of(tenant: str, request_id: str) -> str:
    """The id of the response that a request makes: a retried call finds its response again."""
    digest = hashlib.blake2b(f"{tenant}\0{request_id}".encode(), digest_size=24).hexdigest()
    return f"resp_{digest}"


def ask(
    body: ResponseBody,
    caller: Caller,
    *,
    response_id: str,
    created_at: int,
    seed: int,
    before: Sequence[Json],
    session_id: str,
) -> Asked:
    """Translate a body.

    Args:
        seed: for a body without one.
        before: messages of the conversation that `previous_response_id` names.
        session_id: the conversation's, where the caller names none.

    Raises:
        InvalidRequest: names the field of the response's body.
    """
    if body.background and not body.is_stored:
        raise InvalidRequest("background needs store to be true", param="background")
    check_metadata(body.metadata)
    for name in body.include or ():
        if name != LOGPROBS:
            raise InvalidRequest(f"include: {name[:80]!r} is not known; {LOGPROBS!r} is", param="include")
    digest = response_id.removeprefix("resp_")
    items = _items(body.input, digest)
    messages = [*before, *messages_of(items)]
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    chat: Json = {
        "model": body.model,
        "messages": [*instructions, *messages],
        **{name: getattr(body, name) for name in _AS_IN_A_CHAT if getattr(body, name) is not None},
    }
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if body.top_logprobs is not None or LOGPROBS in (body.include or ()):
        chat["logprobs"] = True
        chat["top_logprobs"] = body.top_logprobs or 0
    if body.text is not None and body.text.format not in (None, {"type": "text"}):
        chat["response_format"] = _response_format(body.text.format or {})
    if body.tools:
        chat["tools"] = [_tool(tool, number) for number, tool in enumerate(body.tools)]
        if body.tool_choice is not None:
            chat["tool_choice"] = _tool_choice(body.tool_choice)
    else:
        chat.pop("parallel_tool_calls", None)
    chat.setdefault("seed", seed)
    caller_fields = asdict(caller)
    caller_fields["session_id"] = caller.session_id or session_id
    return Asked(
        chat=chat,
        shown=_shown(body, response_id, created_at),
        input_items=items,
        messages=messages,
        caller=caller_fields,
    )


def as_a_response_calls_it(error: TriremeError) -> TriremeError:
    """The error with the field's name in a response's body instead of a chat's."""
    if error.param is not None:
        head = error.param.split("[")[0].split(".")[0]
        if head in _NAMES:
            error.param = _NAMES[head]
    return error


def messages_of(items: Sequence[Json]) -> list[Json]:
    """Items of a conversation as a chat's messages.

    Raises:
        InvalidRequest: an item is of another kind, or malformed.
    """
    messages: list[Json] = []
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"), number)})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last = messages[-1] if messages else {}
            if last.get("role") == "assistant" and "tool_calls" in last:
                last["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            said = item.get("output")
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item.get("call_id"),
                    "content": said if isinstance(said, str) else _content(said, number),
                }
            )
        else:
            raise InvalidRequest(
                f"input[{number}]: items of type {str(kind)[:80]!r} are not supported; "
                "message, function_call and function_call_output are",
                param=f"input[{number}].type",
            )
    return messages


def _items(said: str | list[Json], digest: str) -> list[Json]:
    """The input as items with ids, as `input_items` lists them."""
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not said:
        raise InvalidRequest("input is empty: give a text or at least one item", param="input")
    items = []
    for number, item in enumerate(said):
        kept = dict(item)
        kept.setdefault("type", "message")
        if kept["type"] == "message":
            if kept.get("role") not in ("user", "assistant", "system", "developer"):
                raise InvalidRequest(
                    f"input[{number}]: the role must be user, assistant, system or developer",
                    param=f"input[{number}].role",
                )
            if isinstance(kept.get("content"), str):
                kind = "output_text" if kept["role"] == "assistant" else "input_text"
                kept["content"] = [{"type": kind, "text": kept["content"]}]
            kept.setdefault("status", "completed")
        if not isinstance(kept.get("id"), str):
            kept["id"] = f"msg_{digest}_{number}"
        items.append(kept)
    return items


def _content(content: Any, number: int) -> str:
    """The text of a message's parts."""
    where = f"input[{number}].content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a text or a list of parts", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"{where}: parts must be of type input_text or output_text, with a text", param=where
            )
        texts.append(part["text"])
    return "".join(texts)


def _response_format(form: Json) -> Json:
    if form.get("type") != "json_schema":
        return form
    schema = {key: form[key] for key in ("name", "description", "schema", "strict") if key in form}
    return {"type": "json_schema", "json_schema": schema}


def _tool(tool: Json, number: int) -> Json:
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"tools[{number}]: only tools of type 'function' are supported", param=f"tools[{number}].type"
        )
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Json) -> Any:
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function":
        raise InvalidRequest(
            "tool_choice must be none, auto, required or {'type': 'function', 'name': ...}",
            param="tool_choice",
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _shown(body: ResponseBody, response_id: str, created_at: int) -> Json:
    """The response object before anything happened."""
    form = (body.text.format if body.text else None) or {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": body.service_tier or "auto",
        "store": body.is_stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form, "verbosity": (body.text and body.text.verbosity) or "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }
