"""The JSON of answers: valid for every parser, whatever the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Delta
from trireme.gateway.openai_api.shapes import ChatShape, ChoiceParts, Echo, TextShape
from trireme.wire.inference.v1.inference_pb2 import PositionLogprobs, TokenLogprob

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
VOCABULARY = Vocabulary(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "shape",
    [
        ChatShape(VOCABULARY, with_logprobs=True),
        TextShape(VOCABULARY, with_logprobs=True, echoes=[]),
    ],
)
def test_a_token_that_could_not_come_has_a_finite_logprob(shape: ChatShape | TextShape) -> None:
    position = PositionLogprobs(chosen=TokenLogprob(token_id=9, logprob=-0.5))
    position.top.add(token_id=10, logprob=-math.inf)
    delta = Delta(0, 0, [9], "x", ["x"], [position])
    strictly(shape.piece(0, delta, ChoiceParts()))
    parts = ChoiceParts()
    shape.collect(0, delta, parts)
    assert "-9999.0" in json.dumps(shape.whole(0, parts), allow_nan=False)


def asked(*token_ids: int) -> list[PositionLogprobs]:
    return [
        PositionLogprobs(
            chosen=TokenLogprob(token_id=token_id, logprob=-token_id / 8),
            top=[TokenLogprob(token_id=token_id + 1, logprob=-0.25)],
        )
        for token_id in token_ids
    ]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("answered", [False, True])
def test_a_prompt_is_shown_once_with_what_was_told_of_its_tokens(length: int, answered: bool) -> None:
    ids = [40, 41, 42][:length]
    text = VOCABULARY.tokenizer.decode(ids)
    shape = TextShape(VOCABULARY, with_logprobs=True, echoes=[Echo(text, ids)])
    news = [Delta(0, 0, [], "", [], [], asked(*ids[1:]))] if length > 1 or answered else []
    if answered:
        news = [
            Delta(0, 0, [50], "x", ["x"], asked(50), asked(*ids[1:])),
            Delta(0, 1, [51], "y", ["y"], asked(51)),
        ]
    parts, streamed = ChoiceParts(), ChoiceParts()
    assert shape.opening(0, streamed) is None and shape.opening(0, parts) is None
    chunks = []
    for delta in news:
        shape.collect(0, delta, parts)
        chunks.append(shape.piece(0, delta, streamed))
    chunks.append(shape.ending(0, streamed))
    whole = shape.whole(0, parts)
    columns = whole["logprobs"]
    answer = [50, 51] if answered else []
    assert whole["text"] == text + "xy"[: len(answer)]
    assert columns["tokens"] == [VOCABULARY.piece(token_id)[0] for token_id in [*ids, *answer]]
    assert columns["token_logprobs"] == [None, *(-token_id / 8 for token_id in [*ids[1:], *answer])]
    assert columns["top_logprobs"][0] is None and len(columns["top_logprobs"]) == length + len(answer)
    assert columns["text_offset"][-len(answer) :] == [len(text), len(text) + 1] if answered else True
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert whole["text"][offset:].startswith(token) or token not in text

    shown = [strictly(chunk) for chunk in chunks]
    assert "".join(chunk["text"] for chunk in shown) == whole["text"]
    for name, column in columns.items():
        assert [row for chunk in shown for row in (chunk["logprobs"] or {}).get(name, [])] == column
