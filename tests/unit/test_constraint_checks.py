"""Constraints are refused by name before anything runs, and none takes the gateway with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from trireme.errors import InvalidRequest
from trireme.gateway.constraint_checks import ConstraintChecks
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.models import ServedModel
from trireme.wire.inference.v1.inference_pb2 import Choice, Constraint, SamplingParameters

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
MODEL = ServedModel(
    name="py",
    variant_of="",
    vocabulary=Vocabulary(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))),
    chat_template=None,
    context_tokens=2048,
    eos_token_ids=frozenset({0, 4}),
    vocabulary_size=4096,
    created_unix_s=0,
    checkpoint=CHECKPOINT,
)


@pytest.fixture
async def checks() -> AsyncIterator[ConstraintChecks]:
    made = ConstraintChecks()
    yield made
    await made.close()


def sampling(**kind: Any) -> SamplingParameters:
    return SamplingParameters(constraint=Constraint(**kind))


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


async def test_what_is_right_passes_and_what_is_wrong_is_named(checks: ConstraintChecks) -> None:
    await checks.check(MODEL, SamplingParameters())
    assert checks._process is None, "who asks for nothing pays nothing"
    for right in (
        sampling(json_schema='{"type":"object"}'),
        sampling(regex="[0-9]{3}"),
        sampling(grammar='start: "a"+'),
        sampling(grammar='root ::= "a"+'),
        sampling(choice=Choice(texts=["é", 'a"b'])),
    ):
        await checks.check(MODEL, right)
    for wrong, says in (
        (SamplingParameters(constraint=Constraint()), "empty"),
        (sampling(json_schema=""), "empty"),
        (sampling(json_schema="[1]"), "object"),
        (sampling(json_schema="{"), "not JSON"),
        (sampling(json_schema="[" * 20_000), "not JSON"),
        (sampling(json_schema=nested(49)), "levels"),
        (sampling(json_schema='{"type":"number","uniqueItems":true, "not": {}}'), "not"),
        (sampling(json_schema='{"$ref":"http://127.0.0.1/x"}'), "x"),
        (sampling(json_schema=json.dumps({"enum": ["x" * 70_000]})), "bytes"),
        (sampling(regex="(a"), "unclosed"),
        (sampling(regex="(?=a)b"), "look"),
        (sampling(regex="a" * 9000), "bytes"),
        (sampling(grammar="start: nowhere"), "nowhere"),
        (sampling(grammar="root ::= (" + "(" * 3000), "cannot be used"),
        (sampling(choice=Choice()), "at least one"),
        (sampling(choice=Choice(texts=["a", ""])), "empty"),
        (sampling(choice=Choice(texts=["a"] * 1025)), "1025"),
        (SamplingParameters(ignore_eos=True, constraint=Constraint(regex="a")), "ignore_eos"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            await checks.check(MODEL, wrong)


async def test_what_would_compile_for_ever_is_killed_and_others_go_on(
    checks: ConstraintChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(5, 40)]}
    wanted = sampling(json_schema=json.dumps(endless))
    with pytest.raises(InvalidRequest, match="too long"):
        await checks.check(MODEL, wanted)

    async def compile_again(*_: object) -> str:
        raise AssertionError("the verdict is remembered")

    with monkeypatch.context() as patch, pytest.raises(InvalidRequest, match="too long"):
        patch.setattr(checks, "_compile", compile_again)
        await checks.check(MODEL, wanted)
    await checks.check(MODEL, sampling(regex="[0-9]+"))


async def test_a_client_that_goes_away_leaves_no_answer_for_the_next(checks: ConstraintChecks) -> None:
    async def impatient() -> None:
        async with asyncio.timeout(0.01):
            await checks.check(MODEL, sampling(json_schema='{"type":"wrong"}'))

    with pytest.raises(TimeoutError):
        await impatient()
    await checks.check(MODEL, sampling(regex="[0-9]+"))
    with pytest.raises(InvalidRequest, match="wrong"):
        await checks.check(MODEL, sampling(json_schema='{"type":"wrong"}'))
