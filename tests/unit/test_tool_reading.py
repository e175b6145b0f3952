"""Calls of tools are found in any text, however it is cut; what is no call stays as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.gateway.openai_api.tool_reading import Form, ToolReader, form_of

NAMES = ("weather", "add")
PARIS = '{"city": "Paris \\"}] }", "days": [1, {"a": "\\\\"}]}'
CALL = f'{{"name": "weather", "arguments": {PARIS}}}'
ADD = '{"name": "add", "arguments": {}}'


def read(form: Form, pieces: list[str], *, several: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of each call."""
    reader = ToolReader(form, NAMES, several=several)
    content, calls = "", list[tuple[str, str]]()
    for news in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        content += news.content
        for part in news.calls:
            if part.name is not None:
                assert part.index == len(calls)
                calls.append((part.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = name, arguments + part.arguments
    return content, calls


EXPECTED: list[tuple[Form, str, str, list[tuple[str, str]]]] = [
    (Form.MARKED, f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", PARIS)]),
    (
        Form.MARKED,
        f"Let me see. <tool_call>{CALL}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>\n",
        "Let me see. ",
        [("weather", PARIS), ("add", "{}")],
    ),
    (
        Form.MARKED,
        '<tool_call>{"arguments": {"x": 1}, "name": "add"}</tool_call> done',
        "done",
        [("add", '{"x": 1}')],
    ),
    (Form.MARKED, "no < call <tool_ at all <tool_call", "no < call <tool_ at all <tool_call", []),
    (Form.MARKED, "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    (
        Form.MARKED,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    (Form.MARKED, '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    (Form.MARKED, f"<tool_call>{CALL[:-4]}", "", [("weather", CALL[CALL.index('{"city') : -4])]),
    (Form.WHOLE, f"[{CALL}, {ADD}]", "", [("weather", PARIS), ("add", "{}")]),
    (Form.WHOLE, f" {CALL}", "", [("weather", PARIS)]),
    (Form.WHOLE, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (Form.WHOLE, "It is {sunny}.", "It is {sunny}.", []),
    (Form.WHOLE, '[1, 2, "weather"]', '[1, 2, "weather"]', []),
    (Form.WHOLE, '{"name": "rm", "arguments": {}}', '{"name": "rm", "arguments": {}}', []),
    (Form.ARGUMENTS, PARIS, "", [("weather", PARIS)]),
]


@pytest.mark.parametrize("form, text, content, calls", EXPECTED)
def test_calls_and_content_are_told_apart(
    form: Form, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls), "whatever the pieces"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(codec="utf-8"), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    said=st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    form=st.sampled_from([Form.MARKED, Form.WHOLE]),
    indent=st.sampled_from([None, 1]),
    data=st.data(),
)
def test_what_was_called_is_read_back(
    said: list[tuple[str, dict[str, Any]]], form: Form, indent: int | None, data: st.DataObject
) -> None:
    calls = [
        json.dumps({"name": name, "arguments": given}, indent=indent, ensure_ascii=False)
        for name, given in said
    ]
    text = "[" + ",\n".join(calls) + "]"
    if form is Form.MARKED:
        text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, found = read(form, pieces)
    assert [(name, json.loads(arguments)) for name, arguments in found] == said
    assert content == ""


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "<tool", '{"name": "add"', "}", "[", " ", "x", ADD])
    )
)
def test_nothing_breaks_the_reader_and_no_call_is_invented(pieces: list[str]) -> None:
    for form in (Form.MARKED, Form.WHOLE):
        content, calls = read(form, pieces)
        assert all(name in NAMES for name, _ in calls)
        if not calls:
            assert content == "".join(pieces)


def test_one_call_at_most_where_no_more_are_wanted() -> None:
    assert read(Form.WHOLE, [f"[{CALL}, {ADD}]"], several=False) == ("", [("weather", PARIS)])


def test_a_template_tells_how_its_model_writes_calls() -> None:
    assert form_of("{{ '[TOOL_CALLS]' }}") is Form.WHOLE
    assert form_of("<tool_call></tool_call>") is Form.MARKED
    assert form_of("") is Form.MARKED
