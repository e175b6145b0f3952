"""Finds the calls of tools in an answer's text, piece by piece.

Three forms are read: calls as models write them by themselves between `<tool_call>` and `</tool_call>`, an
answer that is a call or a list of calls as a whole, and the bare arguments of a function that had to be
called. What is no call after all is content, to the letter.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

OPENING: Final = "<tool_call>"
CLOSING: Final = "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_LONGEST_HEAD: Final = 1024
"""Characters before a call's arguments; beyond, an answer that is no marked call is content."""
_LONGEST_BLOCK: Final = 65536
"""Characters of a marked call in another order than name and arguments."""


class Form(enum.Enum):
    """How calls stand in the text."""

    MARKED = "marked"
    WHOLE = "whole"
    ARGUMENTS = "arguments"


@dataclass(slots=True)
class CallPart:
    """A piece of one call."""

    index: int
    name: str | None
    """With its first piece."""
    arguments: str


@dataclass(slots=True)
class News:
    """What became clear with a piece of text."""

    content: str = ""
    calls: list[CallPart] = field(default_factory=list)


class ToolReader:
    """Reads one answer.

    Args:
        names: of the functions that may be called; for ARGUMENTS the one.
        several: False: calls after the first are left out.
    """

    def __init__(self, form: Form, names: Sequence[str], *, several: bool = True) -> None:
        self._form = form
        self._names = tuple(names)
        self._several = several
        self._held = ""
        """Text that may yet become a call."""
        self._state = {Form.MARKED: "content", Form.WHOLE: "between", Form.ARGUMENTS: "bare"}[form]
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.num_calls = 0

    def push(self, text: str) -> News:
        """The next piece of the answer."""
        news = News()
        self._held += text
        while self._step(news):
            pass
        return self._trimmed(news)

    def finish(self) -> News:
        """The answer is over: what was held back is content."""
        news = News()
        held, self._held = self._held, ""
        if self._state == "head":
            held = OPENING + held if self._form is Form.MARKED else held
        elif self._state in ("tail", "between") and self.num_calls:
            held = ""
        news.content = held
        return self._trimmed(news)

    def _trimmed(self, news: News) -> News:
        if not self._several:
            news.calls = [call for call in news.calls if call.index == 0]
        return news

    def _step(self, news: News) -> bool:
        """Take something of what is held; False: there is not enough to go on."""
        match self._state:
            case "content":
                return self._content(news)
            case "text":
                news.content += self._held
                self._held = ""
                return False
            case "bare":
                if not self.num_calls:
                    news.calls.append(CallPart(0, self._names[0], ""))
                    self.num_calls = 1
                if self._held:
                    news.calls.append(CallPart(0, None, self._held))
                self._held = ""
                return False
            case "between":
                return self._between()
            case "head":
                return self._head(news)
            case "arguments":
                return self._arguments(news)
            case _:
                return self._tail()

    def _content(self, news: News) -> bool:
        if self.num_calls:
            self._held = self._held.lstrip()
        start = self._held.find(OPENING)
        if start >= 0:
            news.content += self._held[:start]
            self._held = self._held[start + len(OPENING) :]
            self._state = "head"
            return True
        longest = min(len(OPENING) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if self._held.endswith(OPENING[:n])), 0)
        end = len(self._held) - keep
        news.content += self._held[:end]
        self._held = self._held[end:]
        return False

    def _between(self) -> bool:
        """Before, between or behind the calls of an answer that is calls as a whole."""
        rest = self._held.lstrip(" \t\r\n,;]" if self.num_calls else " \t\r\n")
        if not self.num_calls and rest.startswith("["):
            rest = rest[1:].lstrip()
        if not rest:
            return False
        if self.num_calls:
            self._held = rest
        self._state = "head" if rest[0] == "{" else "text"
        return True

    def _head(self, news: News) -> bool:
        text = self._held
        offset = 0
        if self._form is Form.WHOLE and not self.num_calls:
            offset = len(text) - len(text.lstrip().removeprefix("["))
        found = _HEAD.match(text, offset)
        if found:
            name = _text(found[1])
            if name in self._names:
                self._begin(name, news)
                self._held = text[found.end() :]
                return True
            return self._no_call(news)
        if self._form is Form.WHOLE:
            return self._no_call(news) if len(text) > _LONGEST_HEAD else False
        end = text.find(CLOSING)
        if end < 0:
            return self._no_call(news) if len(text) > _LONGEST_BLOCK else False
        call = _call(text[:end])
        if call is None or call[0] not in self._names:
            return self._no_call(news)
        self._begin(call[0], news)
        news.calls.append(CallPart(self.num_calls - 1, None, call[1]))
        self._held = text[end + len(CLOSING) :]
        self._state = "content"
        return True

    def _begin(self, name: str, news: News) -> None:
        news.calls.append(CallPart(self.num_calls, name, ""))
        self.num_calls += 1
        self._state, self._depth, self._in_string, self._escaped = "arguments", 0, False, False

    def _no_call(self, news: News) -> bool:
        if self._form is Form.MARKED:
            news.content += OPENING
            self._state = "content"
        else:
            self._state = "text"
        return True

    def _arguments(self, news: News) -> bool:
        """Pass on a JSON object up to its end."""
        text = self._held
        end = 0
        for character in text:
            end += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                if character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "tail"
                    break
        if end:
            news.calls.append(CallPart(self.num_calls - 1, None, text[:end]))
        self._held = text[end:]
        return self._state == "tail"

    def _tail(self) -> bool:
        """Behind the arguments: the call's end, and its mark where it has one."""
        if self._form is Form.WHOLE:
            rest = self._held.lstrip()
            if rest.startswith("}"):
                self._held, self._state = rest[1:], "between"
                return True
            return self._dropped(rest)
        end = self._held.find(CLOSING)
        if end >= 0:
            self._held, self._state = self._held[end + len(CLOSING) :], "content"
            return True
        return False

    def _dropped(self, rest: str) -> bool:
        if rest:
            self._held, self._state = rest, "text"
            return True
        return False


def form_of(template: str) -> Form:
    """How models of a chat template write calls by themselves."""
    return Form.WHOLE if "[TOOL_CALLS]" in template or "<|python_tag|>" in template else Form.MARKED


def _text(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _call(block: str) -> tuple[str, str] | None:
    """Name and arguments of a marked call, in whatever order."""
    try:
        told = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return None
    arguments = told.get("arguments", told.get("parameters", {}))
    return told["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)
