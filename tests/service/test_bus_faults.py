"""The bus under faults: lost replies, forgotten groups, refusals, garbage, renewals that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from trireme.bus.connection import AWAY, Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.streams import FACT, Stream
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, ProcessRecord

KEYS = Keys("test")
GROUP = "g"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        yield client


@pytest.fixture
def requests(redis: Redis) -> Stream[AdmittedRequest]:
    return Stream(redis, KEYS.requests, AdmittedRequest)


async def names(stream: Stream[AdmittedRequest], consumer: str = "c") -> list[str]:
    entries = await stream.read_group(GROUP, consumer, count=10, block_ms=10)
    return [entry.fact.request_id for entry in entries]


async def test_what_was_read_without_a_reply_is_found_again(
    redis: Redis, requests: Stream[AdmittedRequest]
) -> None:
    await requests.create_group(GROUP)
    for name in ("held", "lost"):
        await requests.publish(AdmittedRequest(request_id=name))
    [held, _] = await requests.read_group(GROUP, "c", count=10, block_ms=10)
    assert await requests.forgotten(GROUP, "c", held={held.entry_id}, idle_ms=60_000) == []
    found = await requests.forgotten(GROUP, "c", held={held.entry_id}, idle_ms=0)
    assert [entry.fact.request_id for entry in found] == ["lost"]
    await redis.xdel(KEYS.requests, found[0].entry_id)
    assert await requests.forgotten(GROUP, "c", held={held.entry_id}, idle_ms=0) == []
    assert (await redis.xpending(KEYS.requests, GROUP))["pending"] == 1, "what was deleted is let go"


async def test_many_forgotten_facts_are_all_found(requests: Stream[AdmittedRequest]) -> None:
    await requests.create_group(GROUP)
    for number in range(600):
        await requests.publish(AdmittedRequest(request_id=str(number)))
    read = await requests.read_group(GROUP, "c", count=1000, block_ms=10)
    held = {entry.entry_id for entry in read[:599]}
    found = await requests.forgotten(GROUP, "c", held=held, idle_ms=0)
    assert [entry.fact.request_id for entry in found] == ["599"]


async def test_a_deleted_entry_of_a_dead_consumer_is_no_fact(
    redis: Redis, requests: Stream[AdmittedRequest]
) -> None:
    await requests.create_group(GROUP)
    for name in ("gone", "there"):
        await requests.publish(AdmittedRequest(request_id=name))
    [gone, _] = await requests.read_group(GROUP, "dead", count=10, block_ms=10)
    await redis.xdel(KEYS.requests, gone.entry_id)
    taken = await requests.take_from(GROUP, "c", dead_consumer="dead")
    assert [entry.fact.request_id for entry in taken] == ["there"]
    assert (await redis.xpending(KEYS.requests, GROUP))["pending"] == 1


async def test_bytes_that_are_no_fact_neither_spin_a_tail_nor_stay_pending(
    redis: Redis, requests: Stream[AdmittedRequest]
) -> None:
    await requests.create_group(GROUP)
    await redis.xadd(KEYS.requests, {FACT: b"\xff\xff"})
    reads = 0
    plain = redis.xread

    async def counting(*args: object, **options: object) -> object:
        nonlocal reads
        reads += 1
        return await plain(*args, **options)  # type: ignore[arg-type]

    redis.xread = counting  # type: ignore[method-assign]
    tailing = asyncio.create_task(anext(requests.tail(after="0-0", block_ms=60_000)))  # type: ignore[arg-type]
    while reads < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert reads == 2, "it waits for what comes after"
    await requests.publish(AdmittedRequest(request_id="good"))
    assert (await tailing).fact.request_id == "good"


async def test_garbage_in_a_group_is_let_go(redis: Redis, requests: Stream[AdmittedRequest]) -> None:
    await requests.create_group(GROUP)
    await redis.xadd(KEYS.requests, {FACT: b"\xff\xff"})
    await requests.publish(AdmittedRequest(request_id="good"))
    assert await names(requests) == ["good"]
    assert (await redis.xpending(KEYS.requests, GROUP))["pending"] == 1


async def test_a_reader_outlives_the_deletion_of_its_stream(
    redis: Redis, requests: Stream[AdmittedRequest]
) -> None:
    await requests.create_group(GROUP)
    waiting = asyncio.create_task(requests.read_group(GROUP, "c", count=10, block_ms=3000))
    await asyncio.sleep(0.1)
    await redis.delete(KEYS.requests)
    assert await waiting == []
    await requests.create_group(GROUP)
    await requests.publish(AdmittedRequest(request_id="next"))
    assert await names(requests) == ["next"]


async def test_a_server_without_memory_is_away_for_commands_pipelines_and_scripts(redis: Redis) -> None:
    script = redis.register_script("return redis.call('SET', KEYS[1], 'x')")
    await script(keys=["warm"])
    await redis.config_set("maxmemory", 1)
    with pytest.raises(AWAY):
        await redis.set("k", "v")
    with pytest.raises(AWAY):
        await script(keys=["k"])
    with pytest.raises(AWAY):
        async with redis.pipeline(transaction=False) as pipe:
            pipe.set("k", "v")
            await pipe.execute()
    with pytest.raises(AWAY):
        async with redis.pipeline(transaction=True) as pipe:
            pipe.set("k", "v")
            await pipe.execute()
    await redis.config_set("maxmemory", 0)
    with pytest.raises(ResponseError):
        await redis.execute_command("HSET", "k")


async def test_a_demoted_server_is_away(redis: Redis) -> None:
    await redis.replicaof("127.0.0.1", 1)
    with pytest.raises(AWAY):
        await redis.set("k", "v")
    await redis.replicaof("NO", "ONE")


async def test_a_renewal_that_fails_ends_the_member(redis: Redis) -> None:
    described = 0

    def describe() -> ProcessRecord:
        nonlocal described
        described += 1
        if described > 1:
            raise ZeroDivisionError
        return ProcessRecord(id="p", service="worker")

    with pytest.raises(ZeroDivisionError):
        async with Registry(redis, KEYS).membership(describe):
            await asyncio.sleep(30)
    assert await Registry(redis, KEYS).living() == []


async def test_a_member_that_is_cancelled_leaves(redis: Redis) -> None:
    async def live() -> None:
        async with Registry(redis, KEYS).membership(lambda: ProcessRecord(id="p", service="worker")):
            await asyncio.sleep(30)

    member = asyncio.create_task(live())
    while not await Registry(redis, KEYS).living():
        await asyncio.sleep(0.01)
    member.cancel()
    with pytest.raises(asyncio.CancelledError):
        await member
    assert await Registry(redis, KEYS).living() == []


async def test_a_server_that_hangs_past_the_lease_takes_no_member_for_dead(redis: Redis) -> None:
    lost: list[bool] = []
    registry = Registry(redis, KEYS)
    record = ProcessRecord(id="p", service="worker")
    async with registry.membership(lambda: record, on_lost=lambda: lost.append(True)):
        await redis.execute_command("CLIENT", "PAUSE", 4000)
        await asyncio.sleep(0.6)  # a renewal is under way
        await redis.ping()
        async with asyncio.timeout(60):
            while [found.id for found in await registry.living()] != ["p"]:
                await asyncio.sleep(0.02)
        assert not lost


async def test_a_member_whose_lease_ended_while_the_server_answered_is_told(redis: Redis) -> None:
    lost = asyncio.Event()
    record = ProcessRecord(id="p", service="worker")
    async with Registry(redis, KEYS).membership(lambda: record, on_lost=lost.set), asyncio.timeout(60):
        await redis.delete(KEYS.process("p"))
        await lost.wait()


async def test_more_commands_at_once_than_connections_wait_their_turn(redis: Redis) -> None:
    replies = await asyncio.gather(*(redis.incr("n") for _ in range(500)))
    assert sorted(replies) == list(range(1, 501))
    assert len(await redis.client_list()) <= 64


async def test_who_lives_can_be_read_while_no_write_is_taken(redis: Redis, redis_url: str) -> None:
    registry = Registry(redis, KEYS)
    for name in ("lives", "died"):
        await registry.put(ProcessRecord(id=name, service="worker"))
    await redis.delete(KEYS.process("died"))
    await redis.config_set("min-replicas-to-write", 1)
    async with Redis.from_url(redis_url) as plain:
        for client in (redis, plain):
            assert [record.id for record in await Registry(client, KEYS).living()] == ["lives"]
        assert await plain.zcard(KEYS.processes) == 2
        await redis.config_set("min-replicas-to-write", 0)
        await Registry(plain, KEYS).living()
        assert await plain.zcard(KEYS.processes) == 1
