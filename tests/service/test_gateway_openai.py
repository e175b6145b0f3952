"""The OpenAI HTTP API, asked by OpenAI's own client: streams, errors, retries, shapes, to the letter."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.gateway_fleet import KEYS, WITHIN_S, fleet
from tests.service.openai_world import IDS, TEXT, TOKENIZER, USER, World
from trireme.bus.request_records import State
from trireme.wire.bus.v1.facts_pb2 import Assignment
from trireme.wire.inference.v1 import inference_pb2 as wire

with_settings = pytest.mark.parametrize


async def test_a_chat_comes_whole(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    raw = await world.client.chat.completions.with_raw_response.create(
        model="py", messages=USER, max_completion_tokens=50, seed=-1
    )
    answer = raw.parse()
    assignment = await serving
    prompt = TOKENIZER.decode(list(assignment.request.prompt_token_ids), skip_special_tokens=False)
    assert prompt == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert (assignment.request.sampling.max_tokens, assignment.request.sampling.seed) == (50, 2**64 - 1)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "py"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == len(assignment.request.prompt_token_ids)
    assert answer.usage.completion_tokens == len(IDS)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(IDS)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    extras = answer.usage.to_dict()["trireme"]
    assert (extras["joules"], extras["grams_co2e"], extras["engine_s"]) == (2.0, 0.25, 0.5)
    assert (extras["variant"], extras["worker"], extras["decision"]) == ("py-1m", "w1", "the only one")
    assert raw.headers["x-trireme-joules"] == "2" and raw.headers["x-trireme-variant"] == "py-1m"
    assert raw.headers["x-request-id"] == assignment.request.request_id
    assert answer.id == "chatcmpl-" + assignment.request.request_id


@with_settings("world", [{"flush_interval_s": 0.0}], indirect=True)
async def test_a_chat_streams_by_the_rules(world: World) -> None:
    serving = asyncio.create_task(world.serve(finish=wire.FINISH_REASON_LENGTH))
    stream = await world.client.chat.completions.create(model="py", messages=USER, stream=True)
    chunks = [chunk async for chunk in stream]
    await serving
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)


async def test_the_wire_of_a_stream_is_server_sent_events(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    body = {"model": "py", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    _, raw, headers = await world.post("/v1/completions", body)
    await serving
    assert headers["Content-Type"].startswith("text/event-stream")
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(IDS)
    assert chunks[-1]["usage"]["trireme"]["joules"] == 2.0
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == TEXT


async def test_the_usage_chunk_reaches_the_client(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    stream = await world.client.chat.completions.create(
        model="py", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    await serving
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(IDS)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_each_chunk_says_the_tokens_so_far_where_that_is_asked_for(world: World, path: str) -> None:
    serving = asyncio.create_task(world.serve())
    options = {"include_usage": True, "continuous_usage_stats": True}
    prompt = {"prompt": "x"} if path == "/v1/completions" else {"messages": USER}
    _, raw, _ = await world.post(
        path, {"model": "py", **prompt, "stream": True, "n": 2, "stream_options": options}
    )
    await serving
    lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line.startswith("data: {")]
    *chunks, last = [json.loads(line) for line in lines]
    usages = [chunk["usage"] for chunk in chunks]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 2 * len(IDS)
    assert len(set(counts)) > 2, "they grow along the stream"
    prompt_tokens = last["usage"]["prompt_tokens"]
    for usage in usages:
        assert usage["prompt_tokens"] == prompt_tokens > 0
        assert usage["total_tokens"] == prompt_tokens + usage["completion_tokens"]


async def test_n_choices_each_have_their_stream(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    stream = await world.client.chat.completions.create(model="py", messages=USER, stream=True, n=2)
    texts, ends, roles = {0: "", 1: ""}, {}, {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.setdefault(choice.index, choice.delta.role)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    await serving
    assert (texts, ends) == ({0: TEXT, 1: TEXT}, {0: "stop", 1: "stop"})
    assert roles == {0: "assistant", 1: "assistant"}
    serving = asyncio.create_task(world.serve())
    whole = await world.client.chat.completions.create(model="py", messages=USER, n=2)
    await serving
    assert [(c.index, c.message.content) for c in whole.choices] == [(0, TEXT), (1, TEXT)]
    assert whole.usage is not None and whole.usage.completion_tokens == 2 * len(IDS)


def positions(ids: list[int]) -> list[wire.PositionLogprobs]:
    return [
        wire.PositionLogprobs(
            chosen=wire.TokenLogprob(token_id=token_id, logprob=-1.0),
            top=[wire.TokenLogprob(token_id=9, logprob=-0.5), wire.TokenLogprob(token_id=10, logprob=-0.75)],
        )
        for token_id in ids
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_chat(world: World, stream: bool) -> None:
    asked = asyncio.create_task(
        world.client.chat.completions.create(  # type: ignore[call-overload]
            model="py", messages=USER, logprobs=True, top_logprobs=2, stream=stream
        )
    )
    assignment = await world.worker.next_assignment()
    assert assignment.request.sampling.logprobs == 2
    world.worker.emit(assignment, ids=IDS, logprobs=positions(IDS), finish=1)
    answer = await asked
    if stream:
        rows = [
            row
            async for chunk in answer
            for choice in chunk.choices
            if choice.logprobs
            for row in choice.logprobs.content
        ]
    else:
        rows = answer.choices[0].logprobs.content
    assert b"".join(bytes(row.bytes) for row in rows).decode() == TEXT
    assert rows[0].token == "return" and rows[0].logprob == -1.0
    assert [(top.token, top.logprob) for top in rows[0].top_logprobs] == [("%", -0.5), ("&", -0.75)]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_text_completion(world: World, stream: bool) -> None:
    asked = asyncio.create_task(
        world.client.completions.create(model="py", prompt="x", logprobs=2, stream=stream)  # type: ignore[call-overload]
    )
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:2], logprobs=positions(IDS[:2]))
    await asyncio.sleep(0.1)
    world.worker.emit(assignment, first=2, ids=IDS[2:], logprobs=positions(IDS[2:]), finish=1)
    answer = await asked
    parts = [c async for c in answer] if stream else [answer]
    columns = [c.logprobs for part in parts for c in part.choices if c.logprobs]
    tokens = [token for column in columns for token in column.tokens]
    offsets = [offset for column in columns for offset in column.text_offset]
    assert len(tokens) == len(offsets) == len(IDS)
    text = "".join(c.text for part in parts for c in part.choices)
    assert text == TEXT
    for token, offset in zip(tokens, offsets, strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)
    assert columns[0].token_logprobs[0] == -1.0 and columns[0].top_logprobs[0] == {"%": -0.5, "&": -0.75}


async def test_text_completions_take_ids_lists_and_echo(world: World) -> None:
    async def answer_all() -> list[Assignment]:
        return [await world.serve() for _ in range(2)]

    serving = asyncio.create_task(answer_all())
    many = await world.client.completions.create(model="py", prompt=["one", "two"], echo=True)
    assert [(c.index, c.text) for c in many.choices] == [(0, "one" + TEXT), (1, "two" + TEXT)]
    prompts = {TOKENIZER.decode(list(a.request.prompt_token_ids)) for a in await serving}
    assert prompts == {"one", "two"}
    assert many.usage is not None and many.usage.completion_tokens == 2 * len(IDS)
    assert many.usage.to_dict()["trireme"]["joules"] == 4.0

    serving_one = asyncio.create_task(world.serve())
    one = await world.client.completions.create(model="py-1m", prompt=IDS, echo=True)
    assignment = await serving_one
    assert list(assignment.request.prompt_token_ids) == IDS and assignment.request.model == "py-1m"
    assert assignment.request.sampling.max_tokens == 16
    assert one.choices[0].text == TEXT + TEXT

    serving = asyncio.create_task(answer_all())
    stream = await world.client.completions.create(model="py", prompt=[[5], [6, 7]], stream=True, echo=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    await serving
    assert texts == {0: TOKENIZER.decode([5]) + TEXT, 1: TOKENIZER.decode([6, 7]) + TEXT}


async def test_a_stop_string_ends_an_answer_and_is_not_shown(world: World) -> None:
    asked = asyncio.create_task(
        world.client.chat.completions.create(model="py", messages=USER, stop=["  #", "never"])
    )
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS)
    await world.worker.heard("stop")
    world.worker.emit(assignment, first=len(IDS), finish=wire.FINISH_REASON_CANCELLED)
    answer = await asked
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("return 1", "stop")


async def test_all_parameters_reach_the_engine(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    await world.client.chat.completions.create(
        model="py",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        max_tokens=99,
        temperature=0.5,
        top_p=0.9,
        stop="§",
        seed=7,
        logit_bias={"5": -1, "6": 2.5},
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        user="u",
        service_tier="priority",
        metadata={"k": "v"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        prompt_cache_key="talk-1",
        extra_body={
            "top_k": 40,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 3,
            "ignore_eos": True,
            "stop_token_ids": [4],
            "priority": -2,
        },
        extra_headers={"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"},
    )
    request = (await serving).request
    s = request.sampling
    prompt = TOKENIZER.decode(list(request.prompt_token_ids), skip_special_tokens=False)
    assert prompt == "<|system|>\nbe brief<|end|>\n<|user|>\nab<|end|>\n<|assistant|>\n"
    assert (s.max_tokens, s.temperature, s.seed, s.n) == (99, 0.5, 7, 1)
    assert s.top_p == pytest.approx(0.9)
    assert (list(s.stop), dict(s.logit_bias)) == (["§"], {5: -1.0, 6: 2.5})
    assert (s.presence_penalty, s.frequency_penalty) == (0.25, -0.5)
    assert (s.top_k, s.min_p, s.repetition_penalty, s.min_tokens) == (40, 0.125, 1.5, 3)
    assert (s.ignore_eos, list(s.stop_token_ids)) == (True, [4])
    assert (request.priority, request.session_id) == (-2, "talk-1")
    assert request.slo_class == wire.SLO_CLASS_INTERACTIVE
    assert request.traceparent.startswith("00-" + "1" * 32)
    serving = asyncio.create_task(world.serve())
    await world.client.completions.create(
        model="py", prompt="x", extra_headers={"x-trireme-slo-class": "batch"}
    )
    assert (await serving).request.slo_class == wire.SLO_CLASS_BATCH


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"foo": 1}, "foo", "unrecognized request argument supplied: foo"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "must provide content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "names the call"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages", "refuses"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
        "provide id",
    ),
    ({"temperature": 2.5}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": float("nan")}, "temperature", ""),
    ({"max_tokens": 0}, "max_tokens", "from 1"),
    ({"max_completion_tokens": 4000}, "max_completion_tokens", "context"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", ""),
    ({"n": 17}, "n", "from 0 to 16"),
    ({"n": 0}, "n", ""),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": [1]}, "stop", ""),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
    ({"messages": [{"role": "user", "content": "x" * 2**20}]}, "messages", "context"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"70000": 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "provide function"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL, TOOL]}, "tools", "same name"),
    ({"tools": [TOOL] * 129}, "tools", "at most 128"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "cannot be combined"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"response_format": {"type": "xml"}}, "response_format.type", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "not both"),
    ({"guided_json": {"type": "wrong"}}, "guided_json", "wrong"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unrecognized"),
    ({"cache_salt": "s"}, "cache_salt", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"store": True}, "store", "not stored"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unrecognized"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        "include_usage",
    ),
    ({"service_tier": "gold"}, "service_tier", ""),
    ({"seed": 2**63}, "seed", ""),
    ({"priority": 1000}, "priority", ""),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
]


@pytest.fixture
async def bare(redis_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """No worker: what is refused is refused before any work."""
    async with (
        fleet(redis_url, tmp_path, workers=0) as made,
        made.gateway() as gateway,
        aiohttp.ClientSession() as http,
    ):
        client = AsyncOpenAI(base_url=f"http://{gateway.http_address}/v1", api_key="none", max_retries=0)
        yield World(made, None, gateway, client, http)  # type: ignore[arg-type]
        await client.close()


async def test_what_is_wrong_is_refused_by_name(bare: World) -> None:
    for change, param, part in BAD:
        body = {"model": "py", "messages": USER, **change}
        status, answer, headers = await bare.post("/v1/chat/completions", body)
        assert status == 400, (change, answer)
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and error["code"], (change, error)
        assert error["param"] == param or param is None, (change, error)
        assert part in error["message"], (change, error)
        assert headers["x-should-retry"] == "false" and headers["x-request-id"]
    assert await bare.fleet.redis.xlen(KEYS.requests) == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [7] * 1700, "n": 2, "echo": True, "logprobs": 20}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": "word " * 3000}, "prompt"),
    ],
)
async def test_what_is_wrong_in_a_text_completion(bare: World, change: dict[str, Any], param: str) -> None:
    status, answer, _ = await bare.post("/v1/completions", {"model": "py", "prompt": "x", **change})
    assert (status, answer["error"]["param"].partition("[")[0]) == (400, param), answer


async def test_malformed_bodies_paths_and_methods_have_the_error_object(bare: World) -> None:
    for raw in (b"{", b"", b"[]", b'"x"', b"\xff", b"[" * 5000, b"null"):
        status, answer, _ = await bare.post("/v1/chat/completions", raw)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", (raw[:20], answer)
    status, answer, _ = await bare.post("/v1/nothing", {})
    assert status == 404 and "no such path" in answer["error"]["message"]
    async with bare.http.get(bare.url + "/v1/completions") as response:
        assert response.status == 405 and "error" in await response.json()
    status, answer, _ = await bare.post("/v1/completions", b" " * (8 * 2**20 + 1))
    assert status == 413 and "larger" in answer["error"]["message"]
    async with bare.http.get(bare.url + "/v1/models", headers={"x-big": "a" * 20_000}) as response:
        assert response.status == 400


async def test_errors_before_the_first_byte_have_their_status(world: World) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await world.client.chat.completions.create(model="gpt-4", messages=USER, stream=True)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        await world.client.completions.create(model="py", prompt=[5] * 2048)
    assert long.value.code == "context_length_exceeded"
    for stream in (False, True):
        asked = asyncio.create_task(
            world.client.chat.completions.create(model="py", messages=USER, stream=stream)  # type: ignore[call-overload]
        )
        assignment = await world.worker.next_assignment()
        failure = ("request_failed", "NaN in logits")
        world.worker.emit(assignment, finish=wire.FINISH_REASON_ERROR, error=failure)
        with pytest.raises(openai.InternalServerError, match="NaN in logits") as failed:
            await asked
        assert failed.value.code == "request_failed"
        assert failed.value.response.headers["x-should-retry"] == "false"


async def test_an_error_after_the_first_byte_is_an_event(world: World) -> None:
    stream = asyncio.create_task(world.client.chat.completions.create(model="py", messages=USER, stream=True))
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:2])
    chunks = await stream
    assert (await anext(chunks)).choices[0].delta.role == "assistant"
    world.worker.emit(assignment, first=2, finish=wire.FINISH_REASON_ERROR, error=("request_failed", "broke"))
    with pytest.raises(openai.APIError, match="broke") as failed:
        async for _ in chunks:
            pass
    assert failed.value.code == "request_failed" and failed.value.type == "server_error"


@with_settings("world", [{"max_inflight": 1, "retry_after_s": 0.7}], indirect=True)
async def test_a_refused_client_comes_back_when_it_was_told(world: World) -> None:
    holding = asyncio.create_task(world.client.completions.create(model="py", prompt="first"))
    assignment = await world.worker.next_assignment()
    status, answer, headers = await world.post("/v1/completions", {"model": "py", "prompt": "x"})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer["error"]["type"] == "rate_limit_error"
    assert 700 <= int(headers["retry-after-ms"]) <= 2000 and headers["retry-after"] in ("1", "2")
    assert headers["x-should-retry"] == "true"
    patient = world.client.with_options(max_retries=5)
    started_s = time.monotonic()
    retried = asyncio.create_task(patient.completions.create(model="py", prompt="second"))
    metrics, full = world.gateway.core.metrics.registry, {"reason": "gateway_full"}
    async with asyncio.timeout(WITHIN_S):
        while (metrics.get_sample_value("trireme_gateway_refused_total", full) or 0) < 2:
            await asyncio.sleep(0.01)
    world.worker.answer(assignment, IDS)
    await holding
    await world.serve()
    assert (await retried).choices[0].text == TEXT
    assert time.monotonic() - started_s >= 0.7


@with_settings("world", [{"admission_s": 0.5}], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_without_its_bus_the_gateway_says_503_and_when_to_return(world: World, number: int) -> None:
    pid = (await world.fleet.redis.info("server"))["process_id"]
    os.kill(pid, number)
    try:
        status, answer, headers = await world.post("/v1/completions", {"model": "py", "prompt": "x"})
        assert (status, answer["error"]["code"]) == (503, "service_unavailable")
        assert headers["x-should-retry"] == "true" and "retry-after" in headers
        async with asyncio.timeout(WITHIN_S):
            while True:
                async with world.http.get(world.url + "/readyz") as response:
                    if response.status == 503:
                        break
                await asyncio.sleep(0.1)
        async with world.http.get(world.url + "/livez") as response:
            assert response.status == 200
    finally:
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)


async def test_a_request_id_is_returned_and_a_retry_attaches(world: World) -> None:
    headers = {"x-request-id": "trace-1"}
    call = {"model": "py", "messages": USER}
    first = asyncio.create_task(world.post("/v1/chat/completions", call, **headers))
    assignment = await world.worker.next_assignment()
    retry = asyncio.create_task(world.post("/v1/chat/completions", call, **headers))
    # Another call that only shares the trace is another request.
    other = asyncio.create_task(world.post("/v1/completions", {"model": "py", "prompt": "x"}, **headers))
    second = await world.worker.next_assignment()
    assert second.request.request_id != assignment.request.request_id
    assert assignment.request.request_id.startswith("trace-1-")
    async with asyncio.timeout(WITHIN_S):  # The retry is attached before the answer ends.
        while len(world.gateway.core._answers) < 3:
            await asyncio.sleep(0.01)
    world.worker.answer(assignment, IDS)
    world.worker.answer(second, IDS)
    answers = await asyncio.gather(first, retry, other)
    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert [headers["x-request-id"] for _, _, headers in answers] == ["trace-1"] * 3
    assert answers[0][1]["choices"] == answers[1][1]["choices"]
    assert world.worker.assigned.empty()
    # Long after its end the same call is a new one.
    await world.worker.heard("confirm", assignment.request.request_id)
    world.worker.outputs.clear()
    world.worker.known.pop(assignment.request.request_id)
    late = asyncio.create_task(world.post("/v1/chat/completions", call, **headers))
    fresh = await world.worker.next_assignment()
    world.worker.answer(fresh, IDS[:3])
    assert (await late)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_stops_its_request(world: World, stream: bool) -> None:
    body = {"model": "py", "messages": USER, "stream": stream}
    asked = asyncio.create_task(world.post("/v1/chat/completions", body))
    assignment = await world.worker.next_assignment()
    if stream:
        world.worker.emit(assignment, ids=IDS[:2])
        await asyncio.sleep(0.1)
    asked.cancel()
    stop = await world.worker.heard("stop", assignment.request.request_id)
    assert stop.reason == "client"
    async with asyncio.timeout(WITHIN_S):
        while True:
            standing = await world.worker.records.standing(assignment.request.request_id)
            if standing is not None and standing.state is State.CANCELLED:
                break
            await asyncio.sleep(0.02)


@with_settings("world", [{"ping_s": 0.1}], indirect=True)
async def test_a_stream_with_nothing_to_say_sends_comments(world: World) -> None:
    body = {"model": "py", "messages": USER, "stream": True}
    async with world.http.post(world.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assignment = await world.worker.next_assignment()
        raw = b""
        while raw.count(b": ping\n\n") < 2:
            raw += await response.content.readany()
        assert raw.startswith(b": ping\n\n")
        world.worker.answer(assignment, IDS)
        raw += await response.read()
    assert raw.endswith(b"data: [DONE]\n\n")
    asking = asyncio.create_task(world.client.chat.completions.create(model="py", messages=USER, stream=True))
    assignment = await world.worker.next_assignment()
    await asyncio.sleep(0.25)
    world.worker.answer(assignment, IDS)
    chunks = [chunk async for chunk in await asking]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT


async def test_a_pause_is_a_comment_that_clients_ignore(world: World) -> None:
    second = await world.fleet.add_worker("w2")
    stream = asyncio.create_task(world.client.chat.completions.create(model="py", messages=USER, stream=True))
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:3])
    chunks = await stream
    text = (await anext(chunks)).choices[0].delta.content or ""
    await world.worker.die()
    moved = await second.next_assignment()
    second.emit(moved, first=3, ids=IDS[3:], finish=1)
    async for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
    assert text == TEXT


async def test_tokens_for_a_slow_client_are_merged(world: World) -> None:
    reader, writer = await asyncio.open_connection(*world.gateway.http_address.split(":"), limit=2**14)
    ids = [5] * 1900
    body = json.dumps({"model": "py", "prompt": "x", "stream": True, "max_tokens": 1900, "ignore_eos": True})
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    assignment = await world.worker.next_assignment()
    for index, token_id in enumerate(ids):
        last = index == len(ids) - 1
        world.worker.emit(assignment, first=index, ids=[token_id], finish=2 if last else None)
        if index % 50 == 0:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.3)
    data = b""
    while b"[DONE]" not in data:
        data += await reader.read(65536)
    writer.close()
    lines = data.decode().replace("\r", "").split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == TOKENIZER.decode(ids)
    assert len(chunks) < len(ids) / 2


@with_settings("world", [{"stall_s": 0.3, "flush_interval_s": 0.0}], indirect=True)
async def test_a_client_that_takes_nothing_is_given_up(world: World) -> None:
    reader, writer = await asyncio.open_connection(*world.gateway.http_address.split(":"), limit=1024)
    row = positions([5])[0]
    row.top.extend(wire.TokenLogprob(token_id=i, logprob=-2.0) for i in range(20))
    body = json.dumps(
        {"model": "py", "messages": USER, "stream": True, "logprobs": True, "n": 16, "ignore_eos": True}
    )
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    assignment = await world.worker.next_assignment()
    for start in range(0, 1500, 100):
        for choice in range(16):
            world.worker.emit(assignment, choice=choice, first=start, ids=[5] * 100, logprobs=[row] * 100)
        await asyncio.sleep(0.01)
    stop = await world.worker.heard("stop", assignment.request.request_id)
    assert stop.reason == "client"
    async with asyncio.timeout(WITHIN_S):  # Its connection ends, too, though more would fit by now.
        with suppress(ConnectionResetError):
            while await reader.read(2**20):
                pass
    writer.close()


async def test_models_are_listed_and_found(world: World) -> None:
    models = [model async for model in world.client.models.list()]
    assert [model.id for model in models] == ["py", "py-1m", "py-1m-half"]
    assert {(model.object, model.owned_by) for model in models} == {("model", "trireme")}
    assert (await world.client.models.retrieve("py-1m")).to_dict()["parent"] == "py"
    with pytest.raises(openai.NotFoundError) as missing:
        await world.client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"


async def test_probes_and_metrics_stand_beside_the_api(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    await world.client.completions.create(model="py", prompt="x")
    await serving
    await world.post("/v1/completions", {"model": "none", "prompt": "x"})
    async with world.http.get(world.url + "/livez") as response:
        assert response.status == 200
    async with asyncio.timeout(WITHIN_S):  # A heartbeat may be missed on a busy machine.
        for path in ("/readyz", "/health"):
            while True:
                async with world.http.get(world.url + path) as response:
                    if response.status == 200:
                        break
    told = [
        'trireme_gateway_requests_total{api="http_v1_completions",code="200"} 1.0',
        'trireme_gateway_requests_total{api="http_v1_completions",code="404"} 1.0',
        f"trireme_gateway_tokens_total {float(len(IDS))}",
        "trireme_gateway_ttft_seconds_count 1.0",
    ]
    async with asyncio.timeout(WITHIN_S):  # A call is counted when it has ended, after its answer.
        while True:
            async with world.http.get(world.url + "/metrics") as response:
                text = await response.text()
            if all(line in text for line in told):
                break


async def test_a_gateway_without_workers_lives_but_is_not_ready(bare: World) -> None:
    async with bare.http.get(bare.url + "/livez") as response:
        assert response.status == 200
    async with asyncio.timeout(WITHIN_S):
        while True:
            async with bare.http.get(bare.url + "/readyz") as response:
                assert response.status == 503
                if "no worker" in await response.text():
                    break


async def test_a_long_chat_is_cut_at_its_turns_if_the_body_says_so(world: World) -> None:
    turn = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]
    messages: Any = [
        {"role": "system", "content": "be brief"},
        *turn * 12,
        {"role": "user", "content": "now"},
    ]
    with pytest.raises(openai.BadRequestError) as refused:
        await world.client.chat.completions.create(model="py", messages=messages)
    assert refused.value.code == "context_length_exceeded"
    for extra in ({"truncation": "auto"}, {"context_overflow": "truncate_pinned"}):
        serving = asyncio.create_task(world.serve())
        answer = await world.client.chat.completions.create(
            model="py", messages=messages, max_tokens=20, extra_body=extra
        )
        request = (await serving).request
        text = TOKENIZER.decode(list(request.prompt_token_ids), skip_special_tokens=False)
        assert text.startswith("<|system|>\nbe brief<|end|>\n")
        assert text.endswith("<|user|>\nnow<|end|>\n<|assistant|>\n")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
        assert answer.usage.to_dict()["trireme"]["truncated_tokens"] > 1000
    with pytest.raises(openai.BadRequestError, match="not two different ones"):
        await world.client.chat.completions.create(
            model="py", messages=messages, extra_body={"truncation": "auto", "context_overflow": "error"}
        )
