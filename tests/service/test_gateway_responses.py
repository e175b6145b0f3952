"""/v1/responses, asked by OpenAI's own client: events, storage, background, replay from a number."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.service.openai_world import IDS, TEXT, TOKENIZER, World
from trireme.wire.inference.v1 import inference_pb2 as wire

OPENING = ["response.created", "response.in_progress"]
ITEM = ["response.output_item.added", "response.content_part.added"]
CLOSING = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def prompt_of(assignment: Any) -> str:
    ids = list(assignment.request.prompt_token_ids)
    return str(TOKENIZER.decode(ids, skip_special_tokens=False))


async def until_ended(world: World, response_id: str, client: AsyncOpenAI | None = None) -> Any:
    async with asyncio.timeout(60):
        while True:
            found = await (client or world.client).responses.retrieve(response_id)
            if found.status not in ("queued", "in_progress"):
                return found
            await asyncio.sleep(0.05)


async def test_a_response_comes_whole(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    answer = await world.client.responses.create(
        model="py", input="hi", instructions="be brief", max_output_tokens=50, metadata={"a": "b"}
    )
    assignment = await serving
    assert prompt_of(assignment) == "<|system|>\nbe brief<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert assignment.request.sampling.max_tokens == 50
    assert (answer.status, answer.output_text, answer.error) == ("completed", TEXT, None)
    assert (answer.instructions, answer.max_output_tokens, answer.metadata) == ("be brief", 50, {"a": "b"})
    message = answer.output[0]
    assert message.type == "message" and message.role == "assistant" and message.status == "completed"
    assert answer.usage is not None and answer.usage.output_tokens == len(IDS)
    assert answer.usage.input_tokens == len(assignment.request.prompt_token_ids)
    assert answer.usage.total_tokens == answer.usage.input_tokens + len(IDS)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    again = await world.client.responses.retrieve(answer.id)
    assert again.to_dict() == answer.to_dict()


async def test_a_response_streams_typed_events_in_order(world: World) -> None:
    serving = asyncio.create_task(world.serve(finish=wire.FINISH_REASON_LENGTH))
    stream = await world.client.responses.create(model="py", input="hi", stream=True)
    events = [event async for event in stream]
    await serving
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.type for event in events] == [
        *OPENING,
        *ITEM,
        *["response.output_text.delta"] * len(deltas),
        *CLOSING,
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == TEXT
    last = events[-1].response
    assert (last.status, last.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert last.output_text == TEXT
    replayed = await world.client.responses.retrieve(last.id, stream=True)
    assert [event.to_dict() async for event in replayed] == [event.to_dict() for event in events]
    async with world.client.responses.stream(response_id=last.id, starting_after=5) as rest:
        assert [event.sequence_number async for event in rest] == list(range(6, len(events)))


async def test_the_sdk_accumulates_the_stream(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    async with world.client.responses.stream(model="py", input="hi") as stream:
        final = await stream.get_final_response()
    await serving
    assert final.output_text == TEXT


async def test_a_conversation_goes_on_from_a_response(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    first = await world.client.responses.create(model="py", input="hi", instructions="be brief")
    first_session = (await serving).request.session_id
    serving = asyncio.create_task(world.serve())
    second = await world.client.responses.create(
        model="py",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "more"}]}],
        previous_response_id=first.id,
    )
    assignment = await serving
    assert prompt_of(assignment) == (
        f"<|user|>\nhi<|end|>\n<|assistant|>\n{TEXT}<|end|>\n<|user|>\nmore<|end|>\n<|assistant|>\n"
    )
    assert assignment.request.session_id == first_session != ""
    assert second.previous_response_id == first.id
    items = [item.to_dict() async for item in await world.client.responses.input_items.list(second.id)]
    assert [item["content"] for item in items] == [[{"type": "input_text", "text": "more"}]]
    with pytest.raises(openai.BadRequestError) as caught:
        await world.client.responses.create(model="py", input="x", previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"


async def test_what_is_not_to_be_stored_is_not(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    answer = await world.client.responses.create(model="py", input="hi", store=False)
    await serving
    with pytest.raises(openai.NotFoundError):
        await world.client.responses.retrieve(answer.id)
    assert not await world.fleet.redis.keys("test:response:*")


async def test_a_deleted_response_is_gone(world: World) -> None:
    serving = asyncio.create_task(world.serve())
    answer = await world.client.responses.create(model="py", input="hi")
    await serving
    await world.client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        await world.client.responses.retrieve(answer.id)
    assert not await world.fleet.redis.keys("test:response:*")


async def test_a_background_response_runs_without_its_client(world: World) -> None:
    answer = await world.client.responses.create(model="py", input="hi", background=True)
    assert answer.status in ("queued", "in_progress") and answer.output == []
    await world.serve()
    ended = await until_ended(world, answer.id)
    assert (ended.status, ended.output_text, ended.background) == ("completed", TEXT, True)
    assert ended.usage.output_tokens == len(IDS)
    await world.worker.heard("confirm")


async def test_a_background_stream_is_taken_up_where_it_broke(world: World) -> None:
    stream = await world.client.responses.create(model="py", input="hi", background=True, stream=True)
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:4])
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    world.worker.emit(assignment, first=4, ids=IDS[4:], finish=1)
    response_id = seen[0].response.id
    rest = await world.client.responses.retrieve(
        response_id, stream=True, starting_after=seen[-1].sequence_number
    )
    events = [*seen, *[event async for event in rest]]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    assert [event.type for event in events[:2]] == ["response.created", "response.queued"]
    assert events[-1].type == "response.completed"


async def test_a_background_response_is_cancelled(world: World) -> None:
    answer = await world.client.responses.create(model="py", input="hi", background=True)
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:2])
    cancelled = await world.client.responses.cancel(answer.id)
    assert cancelled.status == "cancelled"
    await world.worker.heard("stop", assignment.request.request_id)
    stream = await world.client.responses.retrieve(answer.id, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed" and events[-1].response.status == "cancelled"
    assert (await world.client.responses.cancel(answer.id)).status == "cancelled"


async def test_another_gateway_goes_on_with_a_background_response(world: World) -> None:
    async with world.fleet.gateway() as other:
        answer = await world.client.responses.create(model="py", input="hi", background=True)
        assignment = await world.worker.next_assignment()
        world.worker.emit(assignment, ids=IDS[:4])
        url = f"http://{other.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as elsewhere:
            stream = await elsewhere.responses.retrieve(answer.id, stream=True)
            seen = []
            async for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
            await world.gateway.background.leave()
            async with asyncio.timeout(60):
                while world.worker.owners[assignment.request.request_id] != other.gateway_id:
                    await asyncio.sleep(0.02)
            world.worker.emit(assignment, first=4, ids=IDS[4:], finish=1)
            seen += [event async for event in stream]
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
            ended = await until_ended(world, answer.id, elsewhere)
            assert ended.output_text == TEXT
        assert not [m for m in world.worker.messages if m.HasField("stop")]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"background": True, "store": False}, "background"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"conversation": "conv_1"}, "conversation"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(world: World, fields: Any, param: str) -> None:
    status, document, _ = await world.post("/v1/responses", {"model": "py", "input": "x", **fields})
    assert (status, document["error"]["param"]) == (400, param), document


@pytest.mark.parametrize(
    "world", [{"trust_tenant_header": True, "max_responses": 2, "max_background": 1}], indirect=True
)
async def test_tenants_have_shelves_of_their_own(world: World) -> None:
    mine = world.client.with_options(default_headers={"x-trireme-tenant": "mine"})
    other = world.client.with_options(default_headers={"x-trireme-tenant": "other"})
    kept = []
    for _ in range(3):
        serving = asyncio.create_task(world.serve())
        kept.append(await mine.responses.create(model="py", input="hi"))
        await serving
    for call in (
        other.responses.retrieve(kept[2].id),
        other.responses.delete(kept[2].id),
        other.responses.cancel(kept[2].id),
        other.responses.input_items.list(kept[2].id),
        mine.responses.retrieve(kept[0].id),  # The oldest made room.
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.BadRequestError):
        await other.responses.create(model="py", input="x", previous_response_id=kept[2].id)
    assert (await mine.responses.retrieve(kept[1].id)).output_text == TEXT

    running = await mine.responses.create(model="py", input="hi", background=True)
    with pytest.raises(openai.RateLimitError):
        await mine.responses.create(model="py", input="hi", background=True)
    await other.responses.create(model="py", input="hi", background=True)
    for _ in range(2):
        await world.serve()
    assert (await until_ended(world, running.id, mine)).status == "completed"
    assert (await mine.responses.create(model="py", input="hi", background=True)).status == "queued"


async def test_a_gateway_that_lost_its_lease_lets_go(world: World) -> None:
    async with world.fleet.gateway() as other:
        answer = await world.client.responses.create(model="py", input="hi", background=True)
        assignment = await world.worker.next_assignment()
        world.worker.emit(assignment, ids=IDS[:4])
        redis, driving = world.fleet.redis, world.gateway.background._work[0]._driving
        async with asyncio.timeout(60):
            while answer.id in driving:  # As if it had been stuck for longer than a lease.
                holder = await redis.hget("test:work-holders:responses", answer.id)
                if holder == world.gateway.gateway_id.encode():
                    await redis.zadd("test:work:responses", {answer.id: 0})
                await asyncio.sleep(0.01)
            while world.worker.owners[assignment.request.request_id] != other.gateway_id:
                await asyncio.sleep(0.02)
        world.worker.emit(assignment, first=4, ids=IDS[4:], finish=1)
        assert (await until_ended(world, answer.id)).output_text == TEXT
        assert not [message for message in world.worker.messages if message.HasField("stop")]


async def test_a_tool_is_called(world: World) -> None:
    tool: Any = {
        "type": "function",
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        "strict": None,
    }
    said = '{"a": 1}'
    stream = await world.client.responses.create(
        model="py",
        input="add",
        tools=[tool],
        tool_choice={"type": "function", "name": "add"},
        background=True,
        stream=True,
    )
    await world.serve(TOKENIZER.encode(said).ids)
    events = [event async for event in stream]
    assert [event.type for event in events][-5:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    answer = events[-1].response
    (call,) = answer.output
    assert (call.type, call.name, call.arguments) == ("function_call", "add", said)


async def test_a_response_is_held_to_its_schema(world: World) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    serving = asyncio.create_task(world.serve())
    answer = await world.client.responses.create(model="py", input="hi", text={"format": form})
    constraint = (await serving).request.sampling.constraint
    assert json.loads(constraint.json_schema) == schema
    assert answer.text is not None and answer.text.format is not None
    assert answer.text.format.to_dict() == form
