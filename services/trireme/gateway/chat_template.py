"""Chat templates: the checkpoint's own Jinja program, run where it can change nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trireme.errors import InvalidCheckpoint, InvalidRequest


class _TemplateSays(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks an assistant's text for training; here it only stands around it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders conversations for one checkpoint."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `special_tokens` are its variables such as bos_token and eos_token.

        Raises:
            InvalidCheckpoint: the template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._tools: list[Any] | None = None
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidCheckpoint(f"the chat template does not compile: {error}") from error

    def with_tools(self, tools: Sequence[Any]) -> ChatTemplate:
        """The same, for conversations in which these functions may be called."""
        told = copy(self)
        told._tools = list(tools) or None
        return told

    def render(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
        """The prompt for the next answer to a conversation; without `asks` the conversation alone.

        Raises:
            InvalidRequest: the template refuses the conversation (its roles or their order).
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=asks, tools=self._tools, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


def load_chat_template(checkpoint: Path) -> ChatTemplate | None:
    """The template of a checkpoint directory, or None where it has none.

    Raises:
        InvalidCheckpoint: a file is malformed.
    """
    config = read_json(checkpoint / "tokenizer_config.json")
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    file = checkpoint / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special)
    source = config.get("chat_template")
    if isinstance(source, list):  # Several, by name.
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return ChatTemplate(source, special) if isinstance(source, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where the file is absent.

    Raises:
        InvalidCheckpoint: it is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} is not a JSON object")
    return data


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise _TemplateSays(message)
