"""From a checked body to what the core takes: the same for a call, a stored response and a batch's line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trireme.gateway.generation import Generation
from trireme.gateway.limits import at_most, check_token_id
from trireme.gateway.models import ServedModel
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody
from trireme.gateway.openai_api.sampling import chat_sampling, completion_sampling, context_overflow
from trireme.gateway.openai_api.shapes import ChatShape, Echo, Shape, TextShape
from trireme.gateway.openai_api.structure import constraint_param
from trireme.gateway.openai_api.tool_reading import form_of
from trireme.gateway.openai_api.tool_shape import ReaderOf, ToolShape, reader_for
from trireme.gateway.submission import Caller, Submission, generation
from trireme.gateway.truncation import CUTTING, overflow_of
from trireme.wire.inference.v1.inference_pb2 import ContextOverflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a call asks of the core, and how its answer looks."""

    submissions: Sequence[Submission]
    """One per prompt."""
    shape: Shape
    model: str
    """As the client named it."""
    reader: ReaderOf | None = None
    """Where answers may call tools."""


async def prepare_chat(core: Generation, body: ChatBody, caller: Caller) -> Prepared:
    """A chat.

    Raises:
        InvalidRequest, ContextLengthExceeded: names the field to change.
        ModelNotFound: no such model.
    """
    limits = core.limits
    at_most("messages", len(body.messages), limits.max_messages)
    model = core.catalog.find(body.model)
    sampling = chat_sampling(body)
    mode = context_overflow(body)
    messages = [message.for_template() for message in body.messages]
    tools = [tool.for_template() for tool in body.tools or ()] if body.tool_choice != "none" else []
    prompt = await model.tokenize_chat(messages, tools=tools, most_tokens=_most_tokens(core, mode))
    asked = sampling.max_tokens if sampling.HasField("max_tokens") else None
    overflow = await overflow_of(mode, body.pinned_tokens, model, prompt, messages, asked, tools)
    submission = generation(
        caller,
        model,
        prompt,
        sampling,
        limits,
        prompt_param="messages",
        max_tokens_param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        logprobs_param="top_logprobs",
        constraint_param=constraint_param(body),
        overflow=overflow,
    )
    reader = reader_for(body, form_of(model.chat_template.source if model.chat_template else ""))
    with_logprobs = bool(body.logprobs)
    shape: Shape = ChatShape(model.vocabulary, with_logprobs=with_logprobs)
    if reader is not None:
        shape = ToolShape(
            model.vocabulary, with_logprobs=with_logprobs, reader=reader, request_id=caller.request_id
        )
    return Prepared(submissions=[submission], shape=shape, model=body.model, reader=reader)


async def prepare_completion(core: Generation, body: CompletionBody, caller: Caller) -> Prepared:
    """A completion of one prompt or of several; each of several is a request of its own.

    Raises:
        InvalidRequest, ContextLengthExceeded: names the field to change.
        ModelNotFound: no such model.
    """
    model = core.catalog.find(body.model)
    mode = context_overflow(body)
    prompts = await _prompts(core, body, model, _most_tokens(core, mode))
    sampling = completion_sampling(body)
    submissions = [
        generation(
            caller if len(prompts) == 1 else replace(caller, request_id=f"{caller.request_id}/{number}"),
            model,
            prompt,
            sampling,
            core.limits,
            constraint_param=constraint_param(body),
            overflow=await overflow_of(mode, body.pinned_tokens, model, prompt, None, sampling.max_tokens),
        )
        for number, prompt in enumerate(prompts)
    ]
    echoes = _echoes(body, model, prompts) if body.echo else []
    shape = TextShape(model.vocabulary, with_logprobs=body.logprobs is not None, echoes=echoes)
    return Prepared(submissions=submissions, shape=shape, model=body.model)


def _most_tokens(core: Generation, mode: ContextOverflow.ValueType) -> int | None:
    """How long a prompt may be; None: as the context."""
    return core.limits.max_prompt_tokens if mode in CUTTING else None


async def _prompts(
    core: Generation, body: CompletionBody, model: ServedModel, most_tokens: int | None
) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await model.tokenize(prompt, most_tokens=most_tokens)]
    if all(isinstance(part, int) for part in prompt):
        ids = [part for part in prompt if isinstance(part, int)]
        for token_id in (min(ids), max(ids)):
            check_token_id("prompt", token_id, model)
        return [ids]
    at_most("prompt", len(prompt), core.limits.max_prompts)
    return [
        await model.tokenize(part, most_tokens=most_tokens) if isinstance(part, str) else list(part)
        for part in prompt
        if not isinstance(part, int)
    ]


def _echoes(body: CompletionBody, model: ServedModel, prompts: list[list[int]]) -> list[Echo]:
    """The prompts, one per choice."""
    decode = model.vocabulary.tokenizer.decode
    if isinstance(body.prompt, str):
        texts = [body.prompt]
    elif len(prompts) == 1 and isinstance(body.prompt[0], int):
        texts = [decode(prompts[0])]
    else:
        given = zip(body.prompt, prompts, strict=True)
        texts = [part if isinstance(part, str) else decode(ids) for part, ids in given]
    echoes = [Echo(text, ids) for text, ids in zip(texts, prompts, strict=True)]
    return [echo for echo in echoes for _ in range(body.n or 1)]
