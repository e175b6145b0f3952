"""The kvstore as a process: shared memory between processes, deaths on either side, a warm restart."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest

from tests.service.processes import service
from tests.unit.kvstore_support import NAMESPACE, block_hash, payload
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.kvcache.arena import ArenaRef, attach_arena
from trireme.kvcache.store_client import StoreClient
from trireme.wire.bus.v1.facts_pb2 import Hint, Measurement, ProcessRecord, WaitingRequest
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

pytestmark = pytest.mark.fleet

WITHIN_S = 60.0
SIZE = 200_000


@contextmanager
def kvstore(directory: Path, redis_url: str, **more: object) -> Iterator[subprocess.Popen[bytes]]:
    settings: dict[str, object] = {"dram_mib": 8, "ssd_mib": 32, "node": "n1", **more}
    where = {"directory": directory / "ssd", "arena_directory": directory}
    with service("kvstore", directory / "kvstore.log", redis_url=redis_url, **where, **settings) as process:
        yield process


async def record_of(redis_url: str, process: subprocess.Popen[bytes]) -> ProcessRecord:
    """The store's registration."""
    async with open_redis(redis_url) as redis, asyncio.timeout(WITHIN_S):
        registry = Registry(redis, Keys("trireme"))
        while True:
            assert process.poll() is None, "the kvstore ended"
            for record in await registry.living("kvstore"):
                if record.pid == process.pid:
                    return record
            await asyncio.sleep(0.05)


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[rpc.KvStoreAsyncStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield rpc.KvStoreStub(channel)


def blocks(numbers: range) -> list[tuple[bytes, bytes]]:
    return [(block_hash(n), payload(n, SIZE)) for n in numbers]


def hashes(numbers: range) -> list[bytes]:
    return [block_hash(n) for n in numbers]


async def eventually_saved(client: StoreClient, numbers: range) -> None:
    async with asyncio.timeout(WITHIN_S):
        while await client.save(NAMESPACE, blocks(numbers), tenant="t", deadline_s=10.0) < len(numbers):
            await asyncio.sleep(0.05)


def arenas(directory: Path) -> list[Path]:
    return list(directory.glob("*.arena"))


async def test_blocks_go_and_come_by_shared_memory(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client, StoreClient.open(address) as other:
            assert await client.save(NAMESPACE, blocks(range(10)), tenant="t", deadline_s=30) == 10
            assert await client.save(NAMESPACE, blocks(range(12)), tenant="t", deadline_s=30) == 12
            assert await other.match(NAMESPACE, hashes(range(20)), deadline_s=30) == 12
            loaded = await other.load(NAMESPACE, hashes(range(20)), deadline_s=30)
            assert loaded == [payload(n, SIZE) for n in range(12)] + [None] * 8
            assert await other.load("another", hashes(range(2)), deadline_s=30) == [None, None]
            stats = await other.stats(deadline_s=30)
            assert stats is not None and stats.node == "n1"
            assert (stats.dram.blocks, stats.committed, stats.dram.hits, stats.misses) == (12, 12, 12, 10)
            assert (client.counters.saved_blocks, other.counters.loaded_blocks) == (12, 12)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN_S) == 0
    assert arenas(tmp_path) == []


async def test_what_exceeds_dram_is_found_on_ssd_and_again_after_a_restart(
    tmp_path: Path, redis_url: str
) -> None:
    with kvstore(tmp_path, redis_url) as process:
        async with StoreClient.open((await record_of(redis_url, process)).grpc_address) as client:
            for start in range(0, 80, 8):
                await eventually_saved(client, range(start, start + 8))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN_S) == 0
    with kvstore(tmp_path, redis_url) as process:
        async with StoreClient.open((await record_of(redis_url, process)).grpc_address) as client:
            found = [(await client.load(NAMESPACE, [block_hash(n)], deadline_s=30))[0] for n in range(80)]
            assert all(data in (None, payload(n, SIZE)) for n, data in enumerate(found))
            assert sum(data is not None for data in found) >= 40, "DRAM alone held 40 at most"


READER = """
import asyncio, sys
import grpc
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb, kvstore_pb2_grpc as rpc
async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        request = pb.AcquireRequest(
            namespace=sys.argv[2], block_hashes=bytes.fromhex(sys.argv[3]), deadline_s=1, lease_s=1.5)
        response = await rpc.KvStoreStub(channel).Acquire(request)
        print(len(response.blocks), flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_the_lease_of_a_killed_reader_ends_by_itself(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url, ssd_mib=0) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client:
            assert await client.save(NAMESPACE, blocks(range(5)), tenant="t", deadline_s=30) == 5
            reader = await asyncio.create_subprocess_exec(
                *[sys.executable, "-c", READER, address, NAMESPACE, b"".join(hashes(range(5))).hex()],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert reader.stdout is not None and await reader.stdout.readline() == b"5\n"
            reader.kill()
            await reader.wait()
            async with asyncio.timeout(WITHIN_S):
                while (stats := await client.stats()) is None or stats.leases:
                    await asyncio.sleep(0.05)
            assert stats.expired == 1
            for start in range(100, 180, 8):
                await eventually_saved(client, range(start, start + 8))
            assert await client.match(NAMESPACE, hashes(range(5)), deadline_s=30) == 0, "room came back"


async def test_a_byte_flipped_in_shared_memory_is_a_miss(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url, ssd_mib=0) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client, stub_of(address) as stub:
            await eventually_saved(client, range(3))
            acquired = await stub.Acquire(
                pb.AcquireRequest(
                    namespace=NAMESPACE, block_hashes=b"".join(hashes(range(3))), deadline_s=1, lease_s=1
                )
            )
            ref = ArenaRef(
                arena_id=acquired.arena.id, path=acquired.arena.path, size_bytes=acquired.arena.size_bytes
            )
            attach_arena(ref).memory[acquired.blocks[1].offset + 1000] ^= 1
            loaded = await client.load(NAMESPACE, hashes(range(3)), deadline_s=30)
            assert loaded == [payload(0, SIZE), None, None]
            assert client.counters.failures["corrupt"] == 1
            async with asyncio.timeout(WITHIN_S):
                while (stats := await client.stats()) is None or stats.dram.corrupt != 1:
                    await asyncio.sleep(0.02)


async def test_malformed_calls_are_refused_with_their_reason(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url) as process:
        async with stub_of((await record_of(redis_url, process)).grpc_address) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="no multiple of 16") as caught:
                await stub.Match(pb.MatchRequest(namespace="n", block_hashes=b"x" * 17))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError, match="lease_s"):
                await stub.Acquire(pb.AcquireRequest(namespace="n", block_hashes=b"x" * 16))
            empty = pb.NewBlock(block_hash=b"x" * 16)
            with pytest.raises(grpc.aio.AioRpcError, match="payload has 0 bytes"):
                await stub.Reserve(pb.ReserveRequest(namespace="n", blocks=[empty]))
            assert not (await stub.Release(pb.ReleaseRequest(arena_id=b"other", lease_id=1))).held
            assert (await stub.Commit(pb.CommitRequest(arena_id=b"other", generations=[1]))).committed == 0


async def test_a_killed_store_costs_misses_and_a_new_one_serves(tmp_path: Path, redis_url: str) -> None:
    address: str | None = None

    async def find() -> str | None:
        return address

    async with StoreClient.open(find) as client:
        assert await client.load(NAMESPACE, hashes(range(2)), deadline_s=0.5) == [None, None]
        with kvstore(tmp_path, redis_url, ssd_mib=0) as process:
            address = (await record_of(redis_url, process)).grpc_address
            await eventually_saved(client, range(8))
            # Killed while it is used: each answer is right or a miss, and nothing is raised.
            killer = asyncio.create_task(asyncio.to_thread(time.sleep, 0.2))
            killer.add_done_callback(lambda _: process.kill())
            while process.poll() is None:
                loaded = await client.load(NAMESPACE, hashes(range(8)), deadline_s=5.0)
                found = [data for data in loaded if data is not None]
                assert found == [payload(n, SIZE) for n in range(len(found))]
            assert await client.load(NAMESPACE, hashes(range(8)), deadline_s=5.0) == [None] * 8
            assert await client.match(NAMESPACE, hashes(range(8))) == 0
            assert await client.save(NAMESPACE, blocks(range(8)), tenant="t") == 0
            assert await client.stats() is None
            assert client.counters.failures["bug"] == 0
        assert len(arenas(tmp_path)) == 1, "a killed store leaves its arena"
        with kvstore(tmp_path, redis_url, ssd_mib=0) as process:
            address = (await record_of(redis_url, process)).grpc_address
            assert len(arenas(tmp_path)) == 1, "the next one removed it"
            await eventually_saved(client, range(4))
            loaded = await client.load(NAMESPACE, hashes(range(4)), deadline_s=30.0)
            assert loaded == [payload(n, SIZE) for n in range(4)]


async def test_a_store_that_hangs_costs_a_deadline_once_and_not_every_time(
    tmp_path: Path, redis_url: str
) -> None:
    with kvstore(tmp_path, redis_url) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with StoreClient.open(address) as client:
            await eventually_saved(client, range(2))
            process.send_signal(signal.SIGSTOP)
            assert await client.load(NAMESPACE, hashes(range(2)), deadline_s=0.3) == [None, None]
            # One call waited in vain; of the next hundred most are not even tried.
            for _ in range(100):
                assert await client.match(NAMESPACE, hashes(range(2)), deadline_s=0.05) == 0
            failures = client.counters.failures
            assert failures["paused"] > failures["deadline"] > 0
            process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(WITHIN_S):
                while await client.load(NAMESPACE, hashes(range(2)), deadline_s=5.0) == [None, None]:
                    await asyncio.sleep(0.05)


async def test_it_measures_follows_hints_and_shows_its_metrics(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url) as process:
        async with StoreClient.open((await record_of(redis_url, process)).grpc_address) as client:
            await eventually_saved(client, range(6))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN_S) == 0
    with kvstore(tmp_path, redis_url) as process:
        record = await record_of(redis_url, process)
        async with (
            open_redis(redis_url) as redis,
            StoreClient.open(record.grpc_address) as client,
            asyncio.timeout(WITHIN_S),
        ):
            keys = Keys("trireme")
            hints = Stream(redis, keys.hints("n1"), Hint)
            while (stats := await client.stats()) is None or stats.dram.blocks < 6:
                waiting = WaitingRequest(
                    request_id="r", namespace=NAMESPACE, block_hashes=b"".join(hashes(range(6)))
                )
                await hints.publish(
                    Hint(
                        id="h",
                        source="scheduler-1",
                        made_unix_s=time.time(),
                        request_ids=["r"],
                        start_in_s=[2.0],
                        described=[waiting],
                    )
                )
                await asyncio.sleep(0.1)
            assert stats.promoted == stats.fetched_ahead == 6
            assert await client.match(NAMESPACE, hashes(range(8)), deadline_s=WITHIN_S) == 6
            measurements = Stream(redis, keys.measurements, Measurement)
            windows: list[tuple[str, int, int]] = []
            while ("n1", 8, 6) not in windows:
                await asyncio.sleep(0.1)
                entries = await measurements.everything()
                windows = [(e.fact.kv.node, e.fact.kv.lookups, e.fact.kv.hits) for e in entries]
            url = f"http://{record.http_address}/metrics"
            text = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
            assert 'trireme_kv_blocks{tier="dram"} 6.0' in text
            assert "trireme_kv_promoted_total 6.0" in text


async def test_without_its_disk_it_serves_from_memory_and_says_so(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url) as process:
        async with (
            StoreClient.open((await record_of(redis_url, process)).grpc_address) as client,
            asyncio.timeout(WITHIN_S),
        ):
            shutil.rmtree(tmp_path / "ssd")
            while (stats := await client.stats()) is None or stats.ssd.serving:
                await asyncio.sleep(0.1)
            assert stats.ssd.status.startswith("ssd tier is off")
            for start in range(0, 80, 8):
                await eventually_saved(client, range(start, start + 8))
            assert await client.load(NAMESPACE, hashes(range(72, 73)), deadline_s=WITHIN_S) == [
                payload(72, SIZE)
            ]
            while not (status := (await record_of(redis_url, process)).status).startswith("ssd tier is off"):
                assert status == "ok"
                await asyncio.sleep(0.1)
