"""What the HTTP API answers, as its description says it. Tests hold live answers to this.

Answers are not built from these classes: a chunk for every few tokens is put together from text.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PromptTokensDetails(_Answer):
    cached_tokens: int
    """Prompt tokens whose KV was there already."""


class CompletionTokensDetails(_Answer):
    reasoning_tokens: int


class Account(_Answer):
    """What a call used and where it ran; not OpenAI's."""

    truncated_tokens: int
    joules: float
    """Energy attributed to the call."""
    grams_co2e: float
    engine_s: float
    queue_s: float
    first_token_s: float
    total_s: float
    paused_s: float
    variant: str
    worker: str
    decision: str
    """Why it ran there."""
    attempts: int
    """Workers that it was given to, one after the other."""


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    trireme: Account


class UsageSoFar(_Answer):
    """In the middle of a stream, with stream_options.continuous_usage_stats."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(_Answer):
    name: str
    arguments: str
    """JSON; whole only where the answer was not cut."""


class ToolCall(_Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(_Answer):
    name: str = ""
    arguments: str


class ToolCallDelta(_Answer):
    """A piece of a call: id, type and name come with the first, arguments are to be joined."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunctionDelta


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    """Null where there is nothing but calls."""
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Answer):
    """A chat's answer, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None


class ChatDelta(_Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Answer):
    """One event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UsageSoFar | None = None
    """With stream_options.include_usage: null, or what was counted so far where that was asked for; the
    totals are in a last chunk without choices."""


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    """With echo, null for the prompt's first token, which follows nothing."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(_Answer):
    """The answer to a prompt, whole."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: None


class TextChunkChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletionChunk(_Answer):
    """One event of a completion's stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | UsageSoFar | None = None


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """A string where base64 was asked for."""


class EmbeddingsUsage(_Answer):
    prompt_tokens: int
    total_tokens: int
    trireme: Account


class EmbeddingList(_Answer):
    """One vector per text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class ModelCard(_Answer):
    """A model or a variant of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """The model that this is a variant of."""
    max_model_len: int
    """Context in tokens."""
    ready: bool
    """A worker serves it now."""


class ModelList(_Answer):
    """All models and variants."""

    object: Literal["list"]
    data: list[ModelCard]


class _Open(BaseModel):
    """As OpenAI has it; what is named here is always there."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class ResponseObject(_Open):
    """A response as it stands."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    """Messages and function calls; empty while it runs."""
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None


class ResponseEvent(_Open):
    """One event of a response's stream; `type` says which."""

    type: str
    sequence_number: int
    """Counts from 0; a stream can be asked for again from any of them."""


class FileObject(_Answer):
    """A file's card."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    """`batch` for what was uploaded, `batch_output` for what a batch wrote."""
    status: Literal["processed"]
    status_details: None


class BatchCounts(_Answer):
    total: int
    completed: int
    failed: int


class BatchObject(_Open):
    """A batch as it stands."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    """Lines that were answered, in the input's order."""
    error_file_id: str | None
    """Lines that were not."""
    errors: dict[str, Any] | None
    """Why the batch failed before anything ran, by line."""
    created_at: int
    expires_at: int
    request_counts: BatchCounts
    usage: dict[str, Any]


class DeletedObject(_Answer):
    """It is gone."""

    id: str
    object: str
    deleted: Literal[True]


class ObjectPage(_Open):
    """One page of a list."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorDetail(_Answer):
    message: str
    """What to change."""
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class Failure(_Answer):
    """Why a call was not answered; also the data of a stream's last event where it broke."""

    error: ErrorDetail
