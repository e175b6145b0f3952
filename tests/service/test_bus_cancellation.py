"""A loop that reads from the bus ends when it is cancelled, whatever arrives at that moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from trireme.bus.connection import open_redis
from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import Directive


async def tail(stream: Stream[Directive]) -> None:
    async for _ in stream.tail():
        pass


async def read_group(stream: Stream[Directive]) -> None:
    await stream.create_group("g")
    while True:
        await stream.read_group("g", "c", count=10, block_ms=1000)


@pytest.mark.parametrize("read", [tail, read_group])
async def test_a_reader_ends_although_a_fact_arrives_with_its_cancellation(
    redis_url: str, read: Callable[[Stream[Directive]], Awaitable[None]]
) -> None:
    async with open_redis(redis_url) as reading, open_redis(redis_url) as writing:
        for turns in range(40):
            stream = Stream(reading, f"s{turns}", Directive)
            task = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.02)
            await Stream(writing, stream.key, Directive).publish(Directive(id="x"))
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=60.0)
            assert task.done(), f"it reads on, {turns % 10} turns after the fact"


async def test_a_cancelled_task_may_still_say_goodbye(redis_url: str) -> None:
    async with open_redis(redis_url) as redis:

        async def leave_a_note() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await redis.set("first", "1")
                await redis.set("second", "2")

        task = asyncio.create_task(leave_a_note())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await redis.get("second") == b"2"


async def test_a_timeout_around_a_command_is_a_timeout(redis_url: str) -> None:
    async with open_redis(redis_url) as redis:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await redis.blpop(["nothing"], timeout=5)
        assert await redis.ping()
