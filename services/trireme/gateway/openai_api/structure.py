"""From the fields of a body to the constraint that its answer must meet."""

from __future__ import annotations

import json
from typing import Any

from trireme.constraints.constraint import ANY_OBJECT, MAX_DEPTH, depth_of
from trireme.errors import InvalidRequest
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody
from trireme.gateway.openai_api.tool_bodies import MAX_TOOLS, ChosenTool, Function, Tool
from trireme.wire.inference.v1.inference_pb2 import Choice, Constraint

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_BLANKS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


def constraint_in(body: ChatBody | CompletionBody) -> Constraint | None:
    """What the body asks for, by whichever name; None: nothing.

    Raises:
        InvalidRequest: it asks for two different things, or for what is malformed.
    """
    found = _given(body)
    if isinstance(body, ChatBody):
        check_tools(body)
        tools = body.tools or []
        if tools and body.tool_choice != "none":
            if found:
                raise InvalidRequest(
                    f"{found[0][0]} and tools cannot be combined: set tool_choice to none, or leave one out",
                    param=found[0][0],
                )
            return _forced(tools, body.tool_choice, several=body.parallel_tool_calls is not False)
    if len(found) > 1:
        raise InvalidRequest(f"give {found[0][0]} or {found[1][0]}, not both", param=found[1][0])
    return found[0][1] if found else None


def constraint_param(body: ChatBody | CompletionBody) -> str:
    """The field that the constraint comes from, for errors."""
    found = _given(body)
    return found[0][0] if found else "tools"


def check_tools(body: ChatBody) -> None:
    """Refuse tools that contradict each other or the choice among them.

    Raises:
        InvalidRequest: names the field.
    """
    tools = body.tools or []
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(tools)} entries; at most {MAX_TOOLS} are allowed", param="tools"
        )
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: two functions have the same name", param="tools")
    for number, tool in enumerate(tools):
        if depth_of(tool.function.parameters) > MAX_DEPTH:
            raise InvalidRequest(
                f"tools[{number}]: the parameters are more than {MAX_DEPTH} levels deep",
                param=f"tools[{number}].function.parameters",
            )
    choice = body.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice names {choice.function.name!r}, which is not among the tools", param="tool_choice"
        )


def _given(body: ChatBody | CompletionBody) -> list[tuple[str, Constraint]]:
    found: list[tuple[str, Constraint]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append(("response_format", Constraint(json_schema=ANY_OBJECT)))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise InvalidRequest("response_format: json_schema is missing", param="response_format")
        found.append(("response_format", _schema(form.json_schema.schema_ or {"type": "object"})))
    if form is not None and form.type != "json_schema" and form.json_schema is not None:
        raise InvalidRequest("response_format: json_schema needs that type", param="response_format")
    if body.guided_json is not None:
        found.append(("guided_json", _schema(body.guided_json)))
    if body.guided_regex is not None:
        found.append(("guided_regex", Constraint(regex=body.guided_regex)))
    if body.guided_choice is not None:
        found.append(("guided_choice", Constraint(choice=Choice(texts=body.guided_choice))))
    if body.guided_grammar is not None:
        found.append(("guided_grammar", Constraint(grammar=body.guided_grammar)))
    outputs = body.structured_outputs
    if outputs is not None:
        inner = len(found)
        if outputs.json_ is not None:
            found.append(("structured_outputs", _schema(outputs.json_)))
        if outputs.regex is not None:
            found.append(("structured_outputs", Constraint(regex=outputs.regex)))
        if outputs.choice is not None:
            found.append(("structured_outputs", Constraint(choice=Choice(texts=outputs.choice))))
        if outputs.grammar is not None:
            found.append(("structured_outputs", Constraint(grammar=outputs.grammar)))
        if outputs.json_object:
            found.append(("structured_outputs", Constraint(json_schema=ANY_OBJECT)))
        if len(found) != inner + 1:
            raise InvalidRequest(
                "structured_outputs: give one of json, regex, choice, grammar and json_object",
                param="structured_outputs",
            )
    return found


def _schema(schema: str | dict[str, Any]) -> Constraint:
    return Constraint(json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def _forced(tools: list[Tool], choice: str | ChosenTool | None, *, several: bool) -> Constraint | None:
    """A call that must be made: the arguments of the one that is named, else a list of calls."""
    if isinstance(choice, ChosenTool):
        function = next(t.function for t in tools if t.function.name == choice.function.name)
        return _schema(_arguments(function))
    if choice != "required":
        return None
    # Each schema stands alone, so that its references count from its own root.
    names = [f"call{number}" for number in range(len(tools))]
    rules = [
        f"{name}: {json.dumps(_head(tool.function.name))} arguments{number} {json.dumps('}')}\n"
        f"arguments{number}: %json {json.dumps({**_arguments(tool.function), 'x-guidance': _BLANKS})}\n"
        for number, (name, tool) in enumerate(zip(names, tools, strict=True))
    ]
    more = ' (", " call)*' if several else ""
    text = f'start: "[" call{more} "]"\ncall: {" | ".join(names)}\n' + "".join(rules)
    return Constraint(grammar=text)


def _head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


def _arguments(function: Function) -> dict[str, Any]:
    return {"type": "object", **function.parameters} if function.parameters else _NO_ARGUMENTS
