"""Requests through every front end whose texts bear a mark, and whose answers bear another.

What a fleet tells of itself must hold neither. The mark of answers is put there by `guided_choice`, or by
a constraint. Prompts also come as token ids that no figure has by chance.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc
import openai

from trireme.client import Sampling, TriremeClient
from trireme.errors import TriremeError
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1.inference_pb2_grpc import InferenceStub
from trireme.wire.oip.v2 import oip_pb2 as oip
from trireme.wire.oip.v2.oip_pb2_grpc import GRPCInferenceServiceStub

ASKED = "mulberryxqjz"
ANSWERED = "pomegranatewvk"
IDS = [1733, 911, 1847, 1733, 1259, 1871, 911, 1637]
CHOICE: dict[str, Any] = {"guided_choice": [ANSWERED]}
CHAT: Any = [{"role": "system", "content": f"{ASKED} be"}, {"role": "user", "content": f"say {ASKED}"}]
WAIT_S = 120.0


def shows_a_text(told: str | bytes) -> bool:
    """Whether a mark, or the marked token ids, stand there."""
    text = told.decode(errors="replace") if isinstance(told, bytes) else told
    ids = [separator.join(map(str, IDS[:4])) for separator in (", ", ",", " ")]
    packed = b"".join(bytes([token & 127 | 128, token >> 7]) for token in IDS[:4])
    if isinstance(told, bytes) and packed in told:
        return True
    return any(mark in text for mark in (ASKED, ANSWERED, *ids))


async def ask_all(http: str, grpc_address: str) -> None:
    """Ask for everything once, some of it wrongly."""
    async with openai.AsyncOpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client:
        await _chats_and_completions(client)
        await _responses(client)
        await _embeddings_and_batches(client)
    await _what_is_wrong(http)
    await _by_grpc(grpc_address)
    await _by_the_open_inference_protocol(grpc_address)


async def _chats_and_completions(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="py", messages=CHAT, max_tokens=40, user=ASKED, extra_body=CHOICE, logprobs=True
    )
    assert chat.choices[0].message.content == ANSWERED
    stream = await client.chat.completions.create(
        model="py", messages=CHAT, max_tokens=40, stream=True, stop=[ASKED], extra_body=CHOICE
    )
    assert ANSWERED in "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    tool: Any = {
        "type": "function",
        "function": {
            "name": "find",
            "description": ASKED,
            "parameters": {
                "type": "object",
                "properties": {"what": {"enum": [ANSWERED]}},
                "required": ["what"],
                "additionalProperties": False,
            },
        },
    }
    called = await client.chat.completions.create(
        model="py", messages=CHAT, tools=[tool], tool_choice="required", max_tokens=200
    )
    assert called.choices[0].message.tool_calls
    for prompt in (f"def {ASKED}", IDS):
        text = await client.completions.create(
            model="py", prompt=prompt, max_tokens=40, echo=True, logprobs=1, extra_body=CHOICE
        )
        assert text.choices[0].text.endswith(ANSWERED)


async def _responses(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": "py", "input": ASKED, "instructions": ASKED, "max_output_tokens": 60}
    form: Any = {"type": "json_schema", "name": "f", "schema": {"enum": [ANSWERED]}}
    first = await client.responses.create(**asked, text={"format": form})
    assert ANSWERED in first.output_text
    await client.responses.create(**asked, previous_response_id=first.id)
    later = await client.responses.create(**asked, text={"format": form}, background=True)
    async with asyncio.timeout(WAIT_S):
        while (later := await client.responses.retrieve(later.id)).status in ("queued", "in_progress"):
            await asyncio.sleep(0.1)
    assert ANSWERED in later.output_text
    await client.responses.delete(later.id)


async def _embeddings_and_batches(client: openai.AsyncOpenAI) -> None:
    for given in (ASKED, [IDS]):
        assert (await client.embeddings.create(model="py", input=given)).data
    chat = {"model": "py", "messages": CHAT, "max_tokens": 40, **CHOICE}
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate((chat, {**chat, "temperature": ASKED}))
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    async with asyncio.timeout(WAIT_S):
        while (batch := await client.batches.retrieve(batch.id)).status != "completed":
            await asyncio.sleep(0.1)
    assert batch.output_file_id is not None
    assert ANSWERED in (await client.files.content(batch.output_file_id)).text


async def _what_is_wrong(http: str) -> None:
    chat = {"model": "py", "messages": CHAT}
    bodies: list[tuple[str, bytes]] = [
        ("chat/completions", b'{"model": "py", "messages": "' + ASKED.encode()),
        ("chat/completions", json.dumps({**chat, "max_tokens": ASKED}).encode()),
        ("chat/completions", json.dumps({**chat, ASKED: ASKED}).encode()),
        ("chat/completions", json.dumps({**chat, "guided_regex": f"({ASKED}"}).encode()),
        ("completions", json.dumps({"model": "py", "prompt": f"{ASKED} " * 3000}).encode()),
        ("completions", json.dumps({"model": "py", "prompt": [*IDS, 10**6]}).encode()),
        ("embeddings", json.dumps({"model": "py", "input": [ASKED, ""]}).encode()),
        ("responses", json.dumps({"model": "py", "input": [{"type": ASKED}]}).encode()),
    ]
    async with aiohttp.ClientSession() as session:
        for path, body in bodies:
            async with session.post(f"http://{http}/v1/{path}", data=body) as response:
                assert response.status == 400, (path, await response.text())


async def _by_grpc(address: str) -> None:
    async with TriremeClient([address]) as client:
        for prompt in (ASKED, IDS):
            sampling = Sampling(max_tokens=4, prompt_logprobs=1)
            assert [event async for event in client.generate("py", prompt, sampling)]
        assert (await client.embed("py", [ASKED])).vectors
        assert (await client.classify("py", ASKED, [ASKED, ANSWERED])).scores
        await _refused(lambda: client.classify("py", ASKED * 4000, [ANSWERED]))
    async with grpc.aio.insecure_channel(address) as channel:
        request = pb.GenerateRequest(model="py", text=ASKED)
        request.sampling.max_tokens = 40
        request.sampling.constraint.choice.texts.append(ANSWERED)
        answer = [event async for event in InferenceStub(channel).Generate(request)]
        assert ANSWERED in "".join(event.delta.text for event in answer)


async def _refused(call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except TriremeError:
        return
    raise AssertionError("it was not refused")


async def _by_the_open_inference_protocol(address: str) -> None:
    request = oip.ModelInferRequest(model_name="py")
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(ASKED.encode())
    most = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    most.contents.int_contents.append(8)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert (await stub.ModelInfer(request)).outputs
        assert [each async for each in stub.ModelStreamInfer(iter([request]))]
