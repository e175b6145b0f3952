"""Tools, calls of them and forms of answers, as bodies bring them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trireme.constraints.constraint import MAX_DEPTH, depth_of

MAX_TOOLS = 128
MAX_CALLS = 64
"""Calls in one message."""
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Function(_Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; absent: it has none."""
    strict: bool | None = None
    """Accepted: a call that is asked for always keeps to the schema."""


class Tool(_Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = self.function
        shown: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            shown["description"] = function.description
        shown["parameters"] = function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": shown}


class ChosenFunction(_Strict):
    name: FunctionName


class ChosenTool(_Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(_Strict):
    name: FunctionName
    arguments: str
    """JSON."""


class ToolCall(_Strict):
    """A call that an earlier answer made."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: with the arguments as an object, where they are one."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict) or depth_of(arguments) > MAX_DEPTH:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class JsonSchemaForm(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """Absent: any object."""
    strict: bool | None = None
    """Accepted: the schema always holds."""


class ResponseFormat(_Strict):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaForm | None = None


class StructuredOutputs(_Strict):
    """vLLM's form: one of these."""

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
