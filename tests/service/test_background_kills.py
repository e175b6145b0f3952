"""Gateways are killed in the middle of what they drive: others go on, nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from tests.conftest import free_port
from tests.service.gateway_fleet import KEYS, FakeWorker, Fleet, fleet
from tests.service.openai_world import IDS, TEXT, USER
from tests.service.processes import service
from tests.service.test_gateway_batches import ended, line, rows
from trireme.wire.bus.v1.facts_pb2 import Assignment


@asynccontextmanager
async def gateway(
    made: Fleet, folder: Path, name: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], AsyncOpenAI]]:
    """A gateway process and a client of it."""
    http = f"127.0.0.1:{free_port()}"
    with service(
        "gateway",
        folder / f"{name}.log",
        fleet=made.fleet_file,
        redis_url=made.redis_url,
        bus_prefix=KEYS.prefix,
        grpc_listen="127.0.0.1:0",
        http_listen=http,
        silence_s=0.3,
        batch_window=4,
    ) as process:
        url = f"http://{http}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as client:
            async with asyncio.timeout(90):
                while True:
                    try:
                        if next(iter((await client.models.list()).data)).to_dict()["ready"]:
                            break
                    except OpenAIError:
                        pass
                    await asyncio.sleep(0.1)
            yield process, client


async def taken_over(worker: FakeWorker, assignment: Assignment) -> None:
    """Return when another gateway than the first has asked for the request."""
    async with asyncio.timeout(90):
        while worker.owners[assignment.request.request_id] == assignment.request.gateway_id:
            await asyncio.sleep(0.05)


async def begin_response(worker: FakeWorker, client: AsyncOpenAI) -> tuple[Assignment, list[Any]]:
    """A background response of which its client saw a part."""
    stream = await client.responses.create(model="py", input="hi", background=True, stream=True)
    assignment = await worker.next_assignment()
    for place in range(5):
        worker.emit(assignment, first=place, ids=IDS[place : place + 1])
    seen: list[Any] = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            return assignment, seen
    raise AssertionError("the stream ended")


async def end_response(
    worker: FakeWorker, client: AsyncOpenAI, assignment: Assignment, seen: list[Any]
) -> None:
    """The same client goes on elsewhere; the response has no seam."""
    response_id, last = seen[0].response.id, seen[-1].sequence_number
    rest = await client.responses.retrieve(response_id, stream=True, starting_after=last)
    await taken_over(worker, assignment)
    worker.emit(assignment, first=5, ids=IDS[5:], finish=1)
    seen = [*seen, *[event async for event in rest]]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == TEXT
    assert seen[-1].type == "response.completed" and seen[-1].response.output_text == TEXT
    replay = await client.responses.retrieve(response_id, stream=True)
    assert [event.to_dict() async for event in replay] == [event.to_dict() for event in seen]
    await worker.heard("confirm", assignment.request.request_id)


async def begin_batch(worker: FakeWorker, client: AsyncOpenAI) -> tuple[str, list[Assignment]]:
    """A batch of seven lines: one has a result, four are under way, of which one has begun."""
    data = "\n".join(json.dumps(line(f"{number}", messages=USER)) for number in range(7)).encode()
    file = await client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    held = [await worker.next_assignment() for _ in range(4)]
    worker.answer(held.pop(0), IDS)
    held.append(await worker.next_assignment())
    worker.emit(held[0], ids=IDS[:3])
    return batch.id, held


async def end_batch(worker: FakeWorker, client: AsyncOpenAI, batch_id: str, held: list[Assignment]) -> None:
    """All lines come out, each once."""
    worker.emit(held[0], first=3, ids=IDS[3:], finish=1)  # It ends while nobody listens.
    for assignment in held[1:]:
        await taken_over(worker, assignment)
        worker.answer(assignment, IDS)
    for _ in range(2):
        worker.answer(await worker.next_assignment(), IDS)
    done = await ended(client, batch_id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 7, 0)
    output = await rows(client, done.output_file_id)
    assert [row["custom_id"] for row in output] == [f"{number}" for number in range(7)]
    assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in output} == {TEXT}


async def test_what_a_killed_gateway_drove_goes_on_elsewhere(redis_url: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(fleet(redis_url, tmp_path))
        worker = made.workers[0]
        (process, first), (_, second) = await asyncio.gather(
            stack.enter_async_context(gateway(made, tmp_path, "first")),
            stack.enter_async_context(gateway(made, tmp_path, "second")),
        )
        assignment, seen = await begin_response(worker, first)
        batch_id, held = await begin_batch(worker, first)
        process.send_signal(signal.SIGKILL)
        process.wait()
        await end_batch(worker, second, batch_id, held)
        await end_response(worker, second, assignment, seen)
        assert worker.assigned.empty(), "nothing ran twice"
        assert not [message for message in worker.messages if message.HasField("stop")]
