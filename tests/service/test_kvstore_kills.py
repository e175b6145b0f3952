"""`kill -9` at any point of a save, of the writer and of the store: what is read is right or is not there."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.service.test_kvstore import (
    SIZE,
    WITHIN_S,
    eventually_saved,
    hashes,
    kvstore,
    record_of,
)
from tests.unit.kvstore_support import NAMESPACE, block_hash, payload
from trireme.kvcache.store_client import StoreClient

pytestmark = pytest.mark.fleet

WRITER = """
import asyncio, random, sys
from trireme.kvcache.store_client import StoreClient

def block(number, size):
    return random.Random(number).randbytes(size)

async def main(address, namespace, names, size, stage, first):
    names = [bytes.fromhex(names[i:i + 32]) for i in range(0, len(names), 32)]
    async with StoreClient.open(address) as client:
        room = None
        while room is None:
            room = await client.reserve(namespace, [(name, size) for name in names], tenant="t")
        for number, view in enumerate(room.views):
            if stage == "reserved":
                break
            data = block(first + number, size)
            half = size // 2 if stage == "half" and number == len(names) - 1 else size
            view[:half] = data[:half]
        if stage in ("sealed", "committed"):
            for number in range(len(names)):
                assert room.seal(number)
        if stage == "committed":
            assert await client.commit(room) == len(names)
        print(stage, flush=True)
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5], int(sys.argv[6])))
"""


async def test_a_writer_killed_in_the_middle_of_a_save_leaves_nothing_or_all(
    tmp_path: Path, redis_url: str
) -> None:
    stages = ["reserved", "half", "written", "sealed", "committed"]
    with kvstore(tmp_path, redis_url) as process:
        address = (await record_of(redis_url, process)).grpc_address
        await asyncio.gather(*(die_at(stage, address) for stage in stages))
        async with StoreClient.open(address) as client:
            expected: list[bytes | None] = [None] * 16 + [payload(n, SIZE) for n in range(16, 20)]
            assert [await one(client, n) for n in range(20)] == expected
        # Nor does a stop in order write to SSD what nobody committed.
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN_S) == 0
    with kvstore(tmp_path, redis_url) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client:
            assert [await one(client, n) for n in range(20)] == expected


async def one(client: StoreClient, number: int) -> bytes | None:
    return (await client.load(NAMESPACE, [block_hash(number)], deadline_s=30.0))[0]


async def die_at(stage: str, address: str) -> None:
    """A process that writes four blocks of its own, killed at this stage of it."""
    first = 4 * ["reserved", "half", "written", "sealed", "committed"].index(stage)
    names = b"".join(hashes(range(first, first + 4))).hex()
    writer = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", WRITER, address, NAMESPACE, names, str(SIZE), stage, str(first)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert writer.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        assert await writer.stdout.readline() == stage.encode() + b"\n"
    writer.kill()
    await writer.wait()


async def test_a_store_killed_while_it_saves_and_moves_never_gives_a_wrong_byte(
    tmp_path: Path, redis_url: str
) -> None:
    pick = random.Random(7)
    address: str | None = None
    served = 0

    async def find() -> str | None:
        return address

    async with StoreClient.open(find) as client:
        for _ in range(3):
            with kvstore(tmp_path, redis_url) as process:
                address = (await record_of(redis_url, process)).grpc_address
                killer: asyncio.Task[None] | None = None
                while process.poll() is None:
                    first = pick.randrange(100)
                    numbers = range(first, first + 8)
                    if pick.random() < 0.5:
                        await client.save(NAMESPACE, blocks_of(numbers), tenant="t", deadline_s=2.0)
                    loaded = await client.load(NAMESPACE, hashes(numbers), deadline_s=2.0)
                    assert all(
                        data in (None, payload(n, SIZE)) for n, data in zip(numbers, loaded, strict=True)
                    )
                    served += sum(data is not None for data in loaded)
                    if killer is None and served and await holds_on_ssd(client):
                        killer = asyncio.create_task(asyncio.sleep(pick.uniform(0.1, 0.9)))
                        killer.add_done_callback(lambda _, victim=process: victim.kill())  # type: ignore[misc]
        # The last one finds what the killed ones had written, and nothing else.
        with kvstore(tmp_path, redis_url) as process:
            address = (await record_of(redis_url, process)).grpc_address
            async with asyncio.timeout(WITHIN_S):
                while (stats := await client.stats()) is None:
                    await asyncio.sleep(0.05)
            assert stats.ssd.serving and stats.ssd.blocks > 0
            found = [await one(client, n) for n in range(108)]
            assert all(data in (None, payload(n, SIZE)) for n, data in enumerate(found))
            assert served and any(data is not None for data in found)
        assert client.counters.failures["bug"] == client.counters.failures["corrupt"] == 0


async def holds_on_ssd(client: StoreClient) -> bool:
    stats = await client.stats()
    return stats is not None and stats.ssd.blocks > 0


def blocks_of(numbers: range) -> list[tuple[bytes, bytes]]:
    return [(block_hash(n), payload(n, SIZE)) for n in numbers]


async def test_workers_see_without_a_call_what_the_store_holds_and_that_it_died(
    tmp_path: Path, redis_url: str
) -> None:
    address: str | None = None

    async def find() -> str | None:
        return address

    async def until(client: StoreClient, expected: tuple[int, int]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while client.match_local_tiers(NAMESPACE, hashes(range(10))) != expected:
                await asyncio.sleep(0.02)

    async with StoreClient.open(find) as client:
        assert client.match_local(NAMESPACE, hashes(range(10))) == 0
        with kvstore(tmp_path, redis_url) as process:
            address = (await record_of(redis_url, process)).grpc_address
            await eventually_saved(client, range(6))
            await until(client, (6, 6))
            assert not client.has_peers
            assert client.match_local("another", hashes(range(10))) == 0
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=WITHIN_S) == 0
        await until(client, (0, 0))
        with kvstore(tmp_path, redis_url) as process:
            address = (await record_of(redis_url, process)).grpc_address
            await until(client, (6, 0))
            assert await client.load(NAMESPACE, hashes(range(6)), deadline_s=30.0) == [
                payload(n, SIZE) for n in range(6)
            ]
            await until(client, (6, 6))
            process.kill()
            process.wait()
            # Its arena still says so; its heart does not.
            await until(client, (0, 0))


async def test_sessions_are_told_and_asked_for(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client:
            await eventually_saved(client, range(4))
            now_us = int(time.time() * 1e6)
            assert await client.note_session("t", "chat", NAMESPACE, hashes(range(6)), version=now_us)
            assert not await client.note_session("t", "chat", NAMESPACE, hashes(range(2)), version=now_us - 1)
            session = await client.session("t", "chat")
            assert session is not None and session.known
            assert (session.available, session.in_dram, session.payload_bytes) == (4, 4, 4 * SIZE)
            assert session.block_hashes == b"".join(hashes(range(6))) and session.version == now_us
            other = await client.session("another tenant", "chat")
            assert other is not None and not other.known and not other.block_hashes
            assert not await client.note_session("t", "", NAMESPACE, hashes(range(2)), version=1)
