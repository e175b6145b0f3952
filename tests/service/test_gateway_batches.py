"""/v1/files and /v1/batches, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from tests.service.openai_world import IDS, TEXT, TOKENIZER, USER, World
from trireme.runtime.shutdown import end_tasks
from trireme.wire.bus.v1.facts_pb2 import REQUEST_KIND_EMBED
from trireme.wire.inference.v1 import inference_pb2 as wire

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, method: str = "POST", **body: Any) -> dict[str, Any]:
    asked = {"model": "py", "messages": USER, **body}
    return {"custom_id": custom_id, "method": method, "url": url, "body": asked}


async def upload(world: World, lines: list[Any]) -> str:
    data = "\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines).encode()
    file = await world.client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(data), "in.jsonl", "batch")
    return file.id


async def start(world: World, lines: list[Any], endpoint: Any = CHAT) -> Any:
    file_id = await upload(world, lines)
    return await world.client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window="24h", metadata={"who": "me"}
    )


async def ended(client: AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await asyncio.sleep(0.05)


async def rows(client: AsyncOpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(text) for text in content.text.splitlines()]


@asynccontextmanager
async def serving(world: World, *, silent_on: str = "") -> AsyncIterator[list[Any]]:
    """Answer all requests, but for those whose prompt has `silent_on`; yields the assignments."""
    seen: list[Any] = []

    async def serve() -> None:
        while True:
            assignment = await world.worker.assigned.get()
            seen.append(assignment)
            if assignment.request.kind == REQUEST_KIND_EMBED:
                ids = assignment.request.prompt_token_ids
                world.worker.emit(assignment, finish=1, embedding=[float(len(ids)), 0.5])
                continue
            prompt = TOKENIZER.decode(list(assignment.request.prompt_token_ids))
            if not silent_on or silent_on not in prompt:
                world.worker.answer(assignment, IDS)

    task = asyncio.create_task(serve())
    try:
        yield seen
    finally:
        await end_tasks([task])


async def test_files_are_kept_listed_read_and_deleted(world: World) -> None:
    ids = [await upload(world, [line(str(number))]) for number in range(3)]
    listed = [file.id async for file in await world.client.files.list(limit=2)]
    assert listed == ids[::-1], "newest first, over pages"
    assert (await world.client.files.retrieve(ids[0])).status == "processed"
    assert await rows(world.client, ids[1]) == [line("1")]
    assert (await world.client.files.delete(ids[1])).deleted
    with pytest.raises(openai.NotFoundError):
        await world.client.files.content(ids[1])
    assert len(await world.fleet.redis.keys("test:file:*:parts")) == 2


@pytest.mark.parametrize("world", [{"max_files_bytes": 1000, "max_file_bytes": 600}], indirect=True)
async def test_files_have_bounds(world: World) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await world.client.files.create(file=b"x" * 601, purpose="batch")
    assert caught.value.param == "file"
    kept = await world.client.files.create(file=b"x" * 600, purpose="batch")
    with pytest.raises(openai.RateLimitError) as refused:
        await world.client.files.create(file=b"x" * 600, purpose="batch")
    assert refused.value.code == "storage_quota_exceeded"
    await world.client.files.delete(kept.id)
    await world.client.files.create(file=b"x" * 600, purpose="batch")
    with pytest.raises(openai.BadRequestError) as purpose:
        await world.client.files.create(file=b"x", purpose="vision")
    assert purpose.value.param == "purpose"


@pytest.mark.parametrize(
    "world",
    [{"max_fleet_files_bytes": 1500, "max_fleet_batches": 1, "trust_tenant_header": True}],
    indirect=True,
)
async def test_what_all_tenants_keep_has_bounds_too(world: World) -> None:
    a, b = (world.client.with_options(default_headers={"x-trireme-tenant": name}) for name in "ab")
    kept = await a.files.create(file=b"x" * 1000, purpose="batch")
    with pytest.raises(openai.RateLimitError) as refused:
        await b.files.create(file=b"x" * 1000, purpose="batch")
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert await world.fleet.redis.keys("test:file:*:parts") == [f"test:file:{kept.id}:parts".encode()]
    await a.files.delete(kept.id)
    gone = await b.files.create(file=b"x" * 1000, purpose="batch")
    # What Redis let expire counts no more, whoever's it was.
    await world.fleet.redis.delete(f"test:file:{gone.id}", f"test:file:{gone.id}:parts")
    await world.fleet.redis.zadd("test:file-of-all", {gone.id: 1})
    lasting = await a.files.create(file=b"x" * 1000, purpose="batch")
    await world.fleet.redis.zadd("test:file-of-all", {lasting.id: 1})
    with pytest.raises(openai.RateLimitError):
        await b.files.create(file=b"x" * 1000, purpose="batch")
    await a.files.delete(lasting.id)

    def asking(client: AsyncOpenAI, file_id: str) -> Any:
        return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")

    files = [
        await client.files.create(file=json.dumps(line("one")).encode(), purpose="batch") for client in (a, b)
    ]
    first = await asking(a, files[0].id)
    with pytest.raises(openai.RateLimitError, match="run in the fleet"):
        await asking(b, files[1].id)
    async with serving(world):
        await ended(a, first.id)
        await ended(b, (await asking(b, files[1].id)).id)


@pytest.mark.parametrize("world", [{"batch_window": 3}], indirect=True)
async def test_a_batch_runs_its_lines_a_window_at_a_time(world: World) -> None:
    lines = [line(f"line-{number}") for number in range(8)]
    lines[2] = line("line-2", temperature=9)
    async with serving(world, silent_on="hold") as seen:
        batch = await start(world, [*lines[:7], line("held", messages=[{"role": "user", "content": "hold"}])])
        async with asyncio.timeout(60):
            while len(seen) < 7:
                await asyncio.sleep(0.02)
        assert max(request.slo_class for request in (a.request for a in seen)) == wire.SLO_CLASS_BATCH
        held = next(a for a in seen if "hold" in TOKENIZER.decode(list(a.request.prompt_token_ids)))
        assert (await world.client.batches.retrieve(batch.id)).status == "in_progress"
        world.worker.answer(held, IDS)
        done = await ended(world.client, batch.id)
    assert (done.status, done.metadata, done.model) == ("completed", {"who": "me"}, "py")
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (8, 7, 1)
    assert done.usage.output_tokens == 7 * len(IDS)
    output, errors = (
        await rows(world.client, done.output_file_id),
        await rows(world.client, done.error_file_id),
    )
    assert [row["custom_id"] for row in output] == [f"line-{n}" for n in (0, 1, 3, 4, 5, 6)] + ["held"]
    assert {row["response"]["status_code"] for row in output} == {200}
    assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in output} == {TEXT}
    assert [(row["custom_id"], row["response"]["status_code"]) for row in errors] == [("line-2", 400)]
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    assert len({row["id"] for row in output + errors}) == 8
    assert [found.id async for found in await world.client.batches.list()] == [batch.id]
    async with asyncio.timeout(60):
        while await world.fleet.redis.hlen("test:load:w1") and int(
            await world.fleet.redis.hget("test:load:w1", "requests")
        ):
            await asyncio.sleep(0.02)


async def test_what_is_wrong_with_lines_fails_the_batch_by_line(world: World) -> None:
    batch = await start(
        world,
        [
            line("a"),
            "{",
            line("a"),
            line("b", url="/v1/completions"),
            line("c", method="GET"),
            {**line("d"), "extra": 1},
            {**line("e"), "body": []},
            "",
        ],
    )
    failed = await ended(world.client, batch.id)
    assert failed.status == "failed" and failed.errors is not None
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "mismatched_url"),
        (5, "invalid_method"),
        (6, "unknown_parameter"),
        (7, "invalid_body"),
    ]
    assert world.worker.assigned.empty()


async def test_a_cancelled_batch_gives_what_it_has(world: World) -> None:
    hold = [{"role": "user", "content": "hold"}]
    async with serving(world, silent_on="hold"):
        batch = await start(world, [line("done"), line("held", messages=hold)])
        async with asyncio.timeout(60):
            while (await world.client.batches.retrieve(batch.id)).request_counts.completed < 1:
                await asyncio.sleep(0.02)
        assert (await world.client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(world.client, batch.id)
    assert done.status == "cancelled" and done.cancelled_at is not None
    assert [row["custom_id"] for row in await rows(world.client, done.output_file_id)] == ["done"]
    errors = await rows(world.client, done.error_file_id)
    assert [(row["custom_id"], row["error"]["code"]) for row in errors] == [("held", "batch_cancelled")]
    await world.worker.heard("stop", f"{batch.id}.1")


async def test_a_batch_of_responses(world: World) -> None:
    def response_line(custom_id: str, **body: Any) -> dict[str, Any]:
        asked = {"model": "py", "input": "hi", **body}
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": asked}

    wrong: dict[str, Any] = {
        "stream": True,
        "background": True,
        "store": True,
        "previous_response_id": "resp_1",
        "max_output_tokens": 10**6,
    }
    lines = [
        response_line("plain", instructions="be brief", metadata={"a": "b"}),
        response_line("cut", max_output_tokens=20, store=False),
        *(response_line(f"wrong-{name}", **{name: value}) for name, value in wrong.items()),
    ]
    async with serving(world) as seen:
        done = await ended(world.client, (await start(world, lines, "/v1/responses")).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 5)
    for row, asked in zip(await rows(world.client, done.output_file_id), lines, strict=False):
        assert row["custom_id"] == asked["custom_id"]
        found = Response.model_validate(row["response"]["body"])
        assert (found.output_text, found.status, found.model) == (TEXT, "completed", "py")
        assert found.usage is not None and found.usage.output_tokens == len(IDS)
        assert row["response"]["body"]["store"] is False
        with pytest.raises(openai.NotFoundError):
            await world.client.responses.retrieve(found.id)
    assert done.usage.output_tokens == 2 * len(IDS)
    assert {assignment.request.slo_class for assignment in seen} == {wire.SLO_CLASS_BATCH}
    refused = await rows(world.client, done.error_file_id)
    told = [(row["response"]["status_code"], row["response"]["body"]["error"]["param"]) for row in refused]
    assert told == [(400, name) for name in wrong]


async def test_a_batch_of_embeddings(world: World) -> None:
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "py", "input": asked},
        }
        for name, asked in (("one", "some text"), ("ids", [[1, 2, 3], [4]]), ("wrong", ["a", ""]))
    ]
    async with serving(world):
        done = await ended(world.client, (await start(world, lines, "/v1/embeddings")).id)
    one, ids = await rows(world.client, done.output_file_id)
    assert [len(one["response"]["body"]["data"]), one["custom_id"]] == [1, "one"]
    vectors = [row["embedding"] for row in ids["response"]["body"]["data"]]
    assert vectors == [[3.0, 0.5], [1.0, 0.5]]
    (refused,) = await rows(world.client, done.error_file_id)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("wrong", 400)
    assert done.usage.input_tokens > 0


async def test_a_batch_of_completions(world: World) -> None:
    lines = [
        {
            "custom_id": "both",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "py", "prompt": ["a", "b"], "max_tokens": 20},
        }
    ]
    async with serving(world):
        done = await ended(world.client, (await start(world, lines, "/v1/completions")).id)
    output = await rows(world.client, done.output_file_id)
    assert [choice["text"] for choice in output[0]["response"]["body"]["choices"]] == [TEXT, TEXT]


@pytest.mark.parametrize("world", [{"batch_window": 4}], indirect=True)
async def test_another_gateway_goes_on_with_a_batch(world: World) -> None:
    lines = [
        line(f"{number}", messages=[{"role": "user", "content": f"hold {number}"}]) for number in range(6)
    ]
    async with world.fleet.gateway(batch_window=4) as other:
        batch = await start(world, lines)
        held = [await world.worker.next_assignment() for _ in range(4)]
        world.worker.answer(held[0], IDS)
        held.append(await world.worker.next_assignment())
        await world.gateway.background.leave()
        for assignment in held[1:]:
            async with asyncio.timeout(60):
                while world.worker.owners[assignment.request.request_id] != other.gateway_id:
                    await asyncio.sleep(0.02)
            world.worker.answer(assignment, IDS)
        world.worker.answer(await world.worker.next_assignment(), IDS)
        url = f"http://{other.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as elsewhere:
            done = await ended(elsewhere, batch.id)
            output = await rows(elsewhere, done.output_file_id)
        assert [row["custom_id"] for row in output] == [f"{number}" for number in range(6)]
        assert done.error_file_id is None
        assert world.worker.assigned.empty(), "no line ran twice"
        assert not [m for m in world.worker.messages if m.HasField("stop")]


async def test_a_batch_that_is_not_done_in_time_expires(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trireme.gateway.openai_api.batches.WINDOW_S", 1)
    async with serving(world, silent_on="hold"):
        held = line("held", messages=[{"role": "user", "content": "hold"}])
        done = await ended(world.client, (await start(world, [line("done"), held])).id)
    assert done.status == "expired" and done.expired_at is not None
    errors = await rows(world.client, done.error_file_id)
    assert ("held", "batch_expired") in [
        (row["custom_id"], (row["error"] or {}).get("code")) for row in errors
    ]
    output = await rows(world.client, done.output_file_id)
    assert sorted(row["custom_id"] for row in output + errors) == ["done", "held"]


@pytest.mark.parametrize(
    "world",
    [{"max_batch_output_bytes": 100, "batch_window": 1, "max_batch_lines": 2, "trust_tenant_header": True}],
    indirect=True,
)
async def test_batches_have_bounds_and_belong_to_their_tenants(world: World) -> None:
    async with serving(world) as seen:
        done = await ended(world.client, (await start(world, [line("first"), line("second")])).id)
    assert len(seen) == 1, "the second line found no room for its result"
    assert done.request_counts.completed == done.request_counts.failed == 1
    errors = await rows(world.client, done.error_file_id)
    assert [row["response"]["status_code"] for row in errors] == [429]
    failed = await ended(world.client, (await start(world, [line(str(n)) for n in range(3)])).id)
    assert failed.errors.data[0].code == "too_many_lines"

    other = world.client.with_options(default_headers={"x-trireme-tenant": "other"})
    assert [batch.id async for batch in await other.batches.list()] == []
    assert [file.id async for file in await other.files.list()] == []
    for call in (
        other.batches.retrieve(done.id),
        other.batches.cancel(done.id),
        other.files.content(done.output_file_id),
        other.files.delete(done.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.BadRequestError) as caught:
        await other.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"
