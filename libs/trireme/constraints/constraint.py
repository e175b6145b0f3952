"""A constraint as a request brings it, and what can be said of it without a tokenizer."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any, Final

from trireme.errors import InvalidRequest
from trireme.wire.inference.v1 import inference_pb2 as pb

MAX_BYTES: Final = 64 * 1024
"""Of a constraint's text."""
MAX_REGEX_BYTES: Final = 8 * 1024
MAX_DEPTH: Final = 48
"""Objects and lists inside each other in a JSON schema."""
MAX_CHOICES: Final = 1024
ANY_OBJECT: Final = '{"type":"object"}'
"""The schema of `json_object`."""


class ConstraintKind(enum.StrEnum):
    """How the text of a constraint is to be read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """The whole answer matches it; Rust's syntax, without look-around."""
    GRAMMAR = "grammar"
    """Lark, or GBNF."""
    CHOICE = "choice"
    """A JSON list of texts; the answer is one of them."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """Equal constraints are compiled once."""

    kind: ConstraintKind
    text: str


def constraint_of(sampling: pb.SamplingParameters) -> Constraint | None:
    """What the wire asks for; None: nothing.

    Raises:
        InvalidRequest: it is empty, too large or too deep.
    """
    if not sampling.HasField("constraint"):
        return None
    told = sampling.constraint
    match told.WhichOneof("kind"):
        case "json_schema":
            found = Constraint(ConstraintKind.JSON_SCHEMA, told.json_schema)
        case "regex":
            found = Constraint(ConstraintKind.REGEX, told.regex)
        case "grammar":
            found = Constraint(ConstraintKind.GRAMMAR, told.grammar)
        case "choice":
            _check_choices(list(told.choice.texts))
            texts = json.dumps(list(told.choice.texts), ensure_ascii=False)
            found = Constraint(ConstraintKind.CHOICE, texts)
        case _:
            raise _fault("constraint is empty: give json_schema, regex, grammar or choice")
    _check_size(found)
    return found


def _check_choices(texts: list[str]) -> None:
    if not texts or not all(texts):
        raise _fault("choice must list at least one text, and none that is empty")
    if len(texts) > MAX_CHOICES:
        raise _fault(f"choice has {len(texts)} texts; at most {MAX_CHOICES} are allowed")


def _check_size(constraint: Constraint) -> None:
    size = len(constraint.text.encode())
    most = MAX_REGEX_BYTES if constraint.kind is ConstraintKind.REGEX else MAX_BYTES
    if not size:
        raise _fault(f"the {constraint.kind} is empty")
    if size > most:
        raise _fault(f"the {constraint.kind} has {size} bytes; at most {most} are allowed")
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        try:
            schema = json.loads(constraint.text)
        except (ValueError, RecursionError) as error:
            raise _fault(f"the json_schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise _fault("the json_schema must be an object")
        if depth_of(schema) > MAX_DEPTH:
            raise _fault(f"the json_schema is more than {MAX_DEPTH} levels deep")


def depth_of(value: Any) -> int:
    """Objects and lists inside each other, of any depth."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _fault(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="constraint")
