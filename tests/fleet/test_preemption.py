"""Two mlfq workers with little KV under 32 streams: who makes way loses no token, whoever dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.fleet.conftest import Fleet, running
from tests.fleet.test_faults import Answer, ask
from trireme.bus.connection import Keys, open_redis
from trireme.bus.streams import Stream
from trireme.client import TriremeClient
from trireme.wire.bus.v1.facts_pb2 import Event

STREAMS = 32
PROMPTS = [list(range(100 + index, 140 + index)) for index in range(STREAMS)]
TOKENS = [300 if index % 4 else 12 for index in range(STREAMS)]

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(
        tmp_path_factory.mktemp("mlfq"), policy="mlfq", max_sequences=4, max_batch_tokens=32, kv_mib=1
    ) as found:
        yield found


async def under_load(fleet: Fleet, victim: int | None) -> list[Answer]:
    """The streams, every fourth of them short; the victim is killed when a quarter of them has begun."""
    answers = [Answer() for _ in range(STREAMS)]
    async with TriremeClient(fleet.grpc) as client, asyncio.TaskGroup() as tasks:
        for prompt, tokens, answer in zip(PROMPTS, TOKENS, answers, strict=True):
            tasks.create_task(ask(client, prompt, answer, tokens=tokens))
        if victim is not None:
            while sum(len(answer.token_ids) > 4 for answer in answers) < STREAMS // 4:
                await asyncio.sleep(0.005)
            os.kill(victim, signal.SIGKILL)
    return answers


async def counters(fleet: Fleet, name: str) -> list[float]:
    """A counter of each living worker."""
    values = []
    async with aiohttp.ClientSession() as session:
        for record in await fleet.ready_workers(2):
            async with session.get(f"http://{record.http_address}/metrics") as response:
                text = await response.text()
            values += [float(value) for value in re.findall(rf"^{name}_total{{[^}}]*}} (\S+)$", text, re.M)]
    return values


async def preempted(fleet: Fleet) -> AsyncIterator[Event]:
    async with open_redis(str(fleet.state["redis_url"])) as redis:
        stream = Stream(redis, Keys(str(fleet.state["bus_prefix"])).events, Event)
        async for entry in stream.tail(after="0-0"):
            if entry.fact.HasField("preempted"):
                yield entry.fact


async def test_who_makes_way_loses_no_token_even_when_a_worker_dies(fleet: Fleet) -> None:
    calm = [answer.token_ids for answer in await under_load(fleet, None)]
    assert [len(tokens) for tokens in calm] == TOKENS
    for name in ("preemptions", "demotions", "swapped_out_blocks", "swapped_in_blocks"):
        assert min(await counters(fleet, f"trireme_engine_{name}")) > 0, name
    victim = (await fleet.ready_workers(2))[0]
    answers = await under_load(fleet, victim.pid)
    assert [answer.token_ids for answer in answers] == calm
    assert any(answer.attempts > 1 for answer in answers), "the victim held some of the streams"
    await fleet.ready_workers(2)
    for name in ("recomputed_tokens", "evictions", "lost_sequences"):
        assert await counters(fleet, f"trireme_engine_{name}") == [0.0, 0.0], name
    async with asyncio.timeout(60):
        async for event in preempted(fleet):
            assert event.preempted.request_id and event.preempted.worker_id
            assert event.preempted.reason.split(":")[0] in ("paused", "swapped_out")
            return
