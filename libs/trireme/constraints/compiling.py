"""From a constraint to a matcher over a model's tokens.

llguidance bounds what one step may cost, not what compiling may: some schemas of a few hundred bytes would
take for ever. So what comes from outside is compiled first where it can be killed (`check_process`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from trireme.constraints.constraint import Constraint, ConstraintKind
from trireme.errors import InvalidRequest

_BLANKS: Final = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the parts of a JSON text: bounded, or a model that likes blanks would never end."""
_SHOWN_CHARACTERS: Final = 300
"""How much of a compiler's complaint is repeated."""


def limits() -> LLParserLimits:
    """What a matcher may cost: with these, one step of a hostile grammar takes some 10 ms."""
    return LLParserLimits(
        max_items_in_row=500,
        step_max_items=10_000,
        step_lexer_fuel=100_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def open_tokens(checkpoint: Path, *, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """The tokens of a checkpoint, as matchers see them.

    Raises:
        InvalidRequest: the checkpoint has no tokenizer that constraints work with, or no end token.
    """
    eos = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
    file = checkpoint / "tokenizer.json"
    if not eos:
        raise InvalidRequest("constraints need a model with an end-of-sequence token", param="constraint")
    try:
        return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"constraints do not work with this model's tokenizer: {str(error)[:_SHOWN_CHARACTERS]}",
            param="constraint",
        ) from error


def compiled(constraint: Constraint, tokens: LLTokenizer) -> LLMatcher:
    """A matcher at its beginning, to be copied.

    Raises:
        InvalidRequest: the constraint is malformed, uses what is not supported, or allows no answer.
    """
    try:
        matcher = LLMatcher(tokens, _grammar(constraint), limits=limits(), log_level=0)
    except (ValueError, RecursionError) as error:
        raise _fault(constraint, str(error)) from None
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _fault(constraint, matcher.get_error())
    return matcher


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(
                constraint.text, overrides={"whitespace_pattern": _BLANKS}
            )
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.GRAMMAR:
            return grammar_from("grammar", constraint.text)
        case ConstraintKind.CHOICE:
            return grammar_from("choice", constraint.text)


def _fault(constraint: Constraint, what: str) -> InvalidRequest:
    told = " ".join(what.replace("<non-verbose/>", "").split())[:_SHOWN_CHARACTERS]
    return InvalidRequest(f"the {constraint.kind} cannot be used: {told}", param="constraint")
