"""Structured output and tool calls through real processes, as the OpenAI SDK asks for them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any, Literal

import grpc
import openai
import pytest
from pydantic import BaseModel, Field

from tests.fleet.conftest import VARIANT, Fleet
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1 import inference_pb2_grpc as rpc

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

ASK: Any = [{"role": "user", "content": "Which city?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"enum": ["C", "F"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "unit", "days"],
                "additionalProperties": False,
            },
        },
    }
]


class City(BaseModel):
    name: str = Field(max_length=6)
    size: Literal["small", "large"]
    visited: bool


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    await fleet.ready_workers(2)
    async with openai.AsyncOpenAI(base_url=f"http://{fleet.http[0]}/v1", api_key="none") as made:
        yield made


async def test_the_sdk_parses_an_answer_into_a_model(client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(
            client.chat.completions.parse(
                model="py", messages=ASK, response_format=City, max_tokens=120, seed=seed, n=2
            )
            for seed in range(3)
        )
    )
    for answer in answers:
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, City)


async def test_a_completion_matches_an_expression_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    pattern = r"[a-d]{3}-[0-9]{2}(; [a-d]{3}-[0-9]{2}){2}"
    asked: Any = {
        "model": "py",
        "prompt": "codes: ",
        "max_tokens": 80,
        "seed": 5,
        "extra_body": {"guided_regex": pattern},
    }
    whole = await client.completions.create(**asked)
    assert whole.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, whole.choices[0].text)
    stream = await client.completions.create(**asked, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_call_has_arguments_of_its_schema_whole_and_streamed(
    client: openai.AsyncOpenAI, choice: Any
) -> None:
    asked: Any = {
        "model": "py",
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 150,
        "seed": 3,
    }
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather" and call.id
    given = json.loads(call.function.arguments)
    assert given["unit"] in "CF" and 1 <= given["days"] <= 9

    names, arguments, reasons = [], "", []
    stream: Any = await client.chat.completions.create(**asked, stream=True)
    async for chunk in stream:
        reasons.append(chunk.choices[0].finish_reason)
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0
            names += [(part.id, part.function.name)] if part.id else []
            arguments += part.function.arguments
    assert [name for _, name in names] == ["weather"] and arguments == call.function.arguments
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


async def test_a_response_calls_a_function(client: openai.AsyncOpenAI) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}
    answer = await client.responses.create(
        model="py",
        input="Which city?",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=150,
        extra_body={"seed": 3},
    )
    calls: Any = [item for item in answer.output if item.type == "function_call"]
    assert answer.status == "completed" and calls and len(calls) == len(answer.output)
    for call in calls:
        assert call.name == "weather" and json.loads(call.arguments)["unit"] in "CF"


async def test_a_constrained_answer_survives_its_worker(fleet: Fleet, client: openai.AsyncOpenAI) -> None:
    """Killed in the middle; the other worker goes on within the constraint, token for token."""
    pattern = "([a-c]{2}[0-9]-){80}"
    asked: Any = {
        "model": "py",
        "prompt": "x",
        "max_tokens": 400,
        "seed": 11,
        "extra_body": {"guided_regex": pattern},
    }
    expected = (await client.completions.create(**asked)).choices[0].text
    assert re.fullmatch(pattern, expected)
    told = ""
    stream: Any = await client.completions.create(**asked, stream=True)
    is_killed = False
    async for chunk in stream:
        told += chunk.choices[0].text
        if told and not is_killed:
            is_killed = True
            worker = await fleet.busiest_worker()
            os.kill(worker.pid, signal.SIGKILL)
    assert told == expected
    await fleet.ready_workers(2)


async def test_grpc_has_constraints_too_and_refuses_what_is_wrong(fleet: Fleet) -> None:
    async with grpc.aio.insecure_channel(fleet.grpc[0]) as channel:
        stub = rpc.InferenceStub(channel)
        sampling = pb.SamplingParameters(max_tokens=20)
        sampling.constraint.choice.texts.extend(["left", "right"])
        text = ""
        async for event in stub.Generate(pb.GenerateRequest(model=VARIANT, text="go ", sampling=sampling)):
            text += event.delta.text
        assert text in ("left", "right")
        sampling.constraint.regex = "(a"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Generate(pb.GenerateRequest(model=VARIANT, text="go ", sampling=sampling)):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
