"""Request bodies, checked to the letter: a field is known and right, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trireme.errors import InvalidRequest
from trireme.gateway.openai_api.tool_bodies import (
    MAX_CALLS,
    ChosenTool,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    ToolCall,
)

B = TypeVar("B", bound="Strict")

TokenId = Annotated[int, Field(ge=0, lt=2**32)]

MAX_FIELDS = 128
"""Members of one object of a body; no call has so many fields."""
MAX_MAP_ENTRIES = 4096
"""Entries of a map from a client's own keys; what they may be is checked later."""
SHOWN_CHARACTERS = 80
"""How much of a client's own words an error repeats."""


def bounded(limit: int) -> BeforeValidator:
    """At most so many entries of a map."""

    # The checker makes an error of some 500 bytes for each wrong entry, however many there are.
    def check(data: Any) -> Any:
        if isinstance(data, dict) and len(data) > limit:
            raise PydanticCustomError("too_many_entries", f"more than {limit} entries")
        return data

    return BeforeValidator(check)


class Strict(BaseModel):
    """An object whose fields are known and right."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: each chunk says the tokens so far, as vLLM's do."""
    include_obfuscation: bool | None = None
    """Accepted: padding is a server's choice, and none is sent."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class _Tolerant(Strict):
    """Lets a field of other servers pass where it asks for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"more than {MAX_FIELDS} fields")
        if not data.keys() & _LATER.keys():
            return data
        return {key: value for key, value in data.items() if not _asks_nothing(key, value)}


class Message(_Tolerant):
    """One message; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None
    """For an assistant: the calls that it made."""
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """For a tool: the call that this answers."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class _Body(_Tolerant):
    """What both kinds of completion share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Annotated[dict[str, float], bounded(MAX_MAP_ENTRIES)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    """Accepted: an opaque mark of the client's."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    """A JSON schema; this and what follows are vLLM's names."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    context_overflow: Literal["error", "truncate_oldest", "truncate_pinned"] | None = None
    """What happens where prompt and answer outgrow the context; absent: an error."""
    pinned_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """For truncate_pinned: first tokens of the prompt that stay; absent: a chat's system prompt."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_along(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    """Absent: auto, if there are tools."""
    parallel_tool_calls: bool | None = None
    """False: one call at most."""
    metadata: Annotated[dict[str, str], bounded(MAX_MAP_ENTRIES)] | None = None
    """Accepted: an opaque mark of the client's."""
    store: bool | None = None
    """Accepted if false: nothing is stored."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """Calls that share it share a session, so that their KV is found again."""
    truncation: Literal["auto", "disabled"] | None = None
    """As the Responses API has it: `auto` is truncate_pinned, `disabled` is error."""


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    """The answer begins with the prompt, and `logprobs` tells of its tokens, too; `max_tokens` may be 0."""
    best_of: Annotated[int, Field(ge=1)] | None = None


class EmbeddingsBody(_Tolerant):
    """POST /v1/embeddings."""

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, fail_fast=True),
        ]
    )
    """A text or its token ids, or several."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: the numbers as little-endian floats of 32 bits. Absent: float."""
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Refused: a model's vectors have the length that they have."""
    user: str | None = None
    """Accepted: an opaque mark of the client's."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None


_LATER: dict[str, str] = {
    "functions": "function calls",
    "function_call": "function calls",
    "refusal": "refusals",
    "annotations": "annotations",
    "modalities": "other modalities than text",
    "audio": "audio",
    "prediction": "predicted outputs",
    "web_search_options": "web search",
    "reasoning_effort": "reasoning effort",
    "verbosity": "verbosity",
    "suffix": "a suffix",
    "cache_salt": "a salt from the client",
}
"""Fields that others know and this server does not; null, an empty list and "none" ask for nothing."""


def _asks_nothing(key: str, value: Any) -> bool:
    if key not in _LATER:
        return False
    return value in (None, "none", [], {}) or (key == "modalities" and value == ["text"])


def parse(body_class: type[B], raw: bytes) -> B:
    """Read and check a body.

    Raises:
        InvalidRequest: names the first field at fault.
    """
    try:
        body = body_class.model_validate_json(raw)
    except ValidationError as error:
        raise _fault(error) from None
    if isinstance(body, _Body) and body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    if isinstance(body, _Body) and body.counts_along and not body.includes_usage:
        raise InvalidRequest(
            "continuous_usage_stats needs include_usage to be true",
            param="stream_options.continuous_usage_stats",
        )
    return body


def _fault(error: ValidationError) -> InvalidRequest:
    item = error.errors(include_url=False)[0]
    loc, kind, param = item["loc"], item["type"], _param(item["loc"])
    name = str(loc[-1])[:SHOWN_CHARACTERS] if loc else ""
    match kind:
        case "json_invalid":
            return InvalidRequest(f"the body is not valid JSON: {item['msg'].removeprefix('Invalid JSON: ')}")
        case "extra_forbidden" if name in _LATER:
            return InvalidRequest(f"{name}: {_LATER[name]} are not supported", param=param)
        case "extra_forbidden":
            return InvalidRequest(f"unrecognized request argument supplied: {name}", param=param)
        case "missing":
            return InvalidRequest(f"you must provide {name}", param=param)
    return InvalidRequest(f"{param or 'the body'}: {item['msg']}", param=param)


def _param(loc: tuple[int | str, ...]) -> str | None:
    """The field's path, without the names that the checker gives to a union's branches."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" in part or part in ("str", "int", "float", "bool", "constrained-int"):
            break
        else:
            part = part[:SHOWN_CHARACTERS]
            path += f".{part}" if path else part
    return path or None
