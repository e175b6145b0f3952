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
from trireme.gateway.openai_api.shapes import ChatShape, ChoiceParts, TextShape
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
    shape.collect(delta, parts)
    assert "-9999.0" in json.dumps(shape.whole(0, parts), allow_nan=False)
