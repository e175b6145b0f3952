"""Where the turns of a conversation begin in its prompt.

Asked of the checkpoint's own template: the conversation up to a message is rendered alone, and is
a border where the whole begins with it. A template that looks ahead has no such place, and then
none is told; a cut is made all the same, only not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trireme.errors import InvalidRequest
from trireme.gateway.chat_template import ChatTemplate
from trireme.gateway.models import ServedModel

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Turns:
    """Offsets in a prompt's tokens."""

    system_tokens: int | None
    """Length of the system prompt at its start; None: the template does not tell."""
    borders: tuple[int, ...]
    """Where users begin to speak, ascending; as many as the template tells."""
    newest: int | None
    """The last of them, if it is told: where the question begins."""


async def turns_of(
    model: ServedModel, messages: Messages, prompt_token_ids: Sequence[int], tools: Messages = ()
) -> Turns:
    """Find the turns of a conversation whose prompt is `prompt_token_ids`, off the event loop.

    Raises:
        InvalidRequest: as `ServedModel.tokenize_chat` does.
    """
    return await asyncio.to_thread(_turns_of, model, messages, prompt_token_ids, tools)


def _turns_of(
    model: ServedModel, messages: Messages, prompt_token_ids: Sequence[int], tools: Messages
) -> Turns:
    template, said, seam = model.disarmed_chat(messages, tools)
    whole = template.render(said)
    num_system = next((n for n, message in enumerate(said) if message["role"] != "system"), len(said))
    users = [number for number, message in enumerate(said) if message["role"] == "user"]
    offsets: dict[int, int] = {}
    for number in sorted({num_system, *users}):
        length = _length_before(template, said[:number], whole)
        if length is not None:
            offsets[number] = length

    ends = sorted({0, *offsets.values(), len(whole)})
    tokens_at, ids = {0: 0}, list[int]()
    for start, end in pairwise(ends):
        ids += model.encode_rendered(whole[start:end], seam)
        tokens_at[end] = len(ids)
    unknown = None if num_system else 0
    if ids != list(prompt_token_ids):  # a token spans a border
        return Turns(unknown, (), None)
    found = {number: tokens_at[length] for number, length in offsets.items()}
    borders = tuple(sorted({found[number] for number in users if number in found}))
    newest = found.get(users[-1]) if users else None
    if num_system in found and _says(whole[: offsets[num_system]], said[:num_system]):
        return Turns(found[num_system], borders, newest)
    return Turns(unknown, borders, newest)


def _length_before(template: ChatTemplate, said: Messages, whole: str) -> int | None:
    """Characters of `whole` that stand for the messages `said`; None where it does not begin so."""
    if not said:
        return 0
    try:
        text = template.render(said, asks=False)
    except InvalidRequest:
        return None  # It takes no conversation that ends there.
    return len(text) if whole.startswith(text) else None


def _says(text: str, said: Messages) -> bool:
    """Whether a system prompt stands there: some templates move it into the first question."""
    return all(message["content"].strip() in text for message in said)
