"""Two kvstores on two nodes, each with its arena: blocks go between them by gRPC, checked and bounded."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from tests.service.test_kvstore import (
    SIZE,
    WITHIN_S,
    blocks,
    eventually_saved,
    hashes,
    kvstore,
    record_of,
    stub_of,
)
from tests.unit.kvstore_support import NAMESPACE, block_hash, payload
from trireme.bus.connection import Keys, open_redis
from trireme.bus.streams import Stream
from trireme.kvcache.arena import ArenaRef, attach_arena
from trireme.kvcache.block_codec import block_keys, image_bytes, payload_checksum
from trireme.kvcache.store_client import StoreClient
from trireme.wire.bus.v1.facts_pb2 import Hint, WaitingRequest
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

pytestmark = pytest.mark.fleet


async def until_peers(client: StoreClient, count: int = 1) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (stats := await client.stats()) is None or stats.peers != count:
            await asyncio.sleep(0.05)


async def test_a_session_saved_on_one_node_is_served_on_another(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        kvstore(tmp_path / "a", redis_url, node="a") as first,
        kvstore(tmp_path / "b", redis_url, node="b", ssd_mib=0) as second,
    ):
        address_a = (await record_of(redis_url, first)).grpc_address
        address_b = (await record_of(redis_url, second)).grpc_address
        async with StoreClient.open(address_a) as a, StoreClient.open(address_b) as b:
            await eventually_saved(a, range(12))
            await until_peers(b)
            # Without leave nothing is brought; with it the whole chain comes, and its end is a miss.
            assert await b.match(NAMESPACE, hashes(range(16)), deadline_s=WITHIN_S) == 0
            assert await b.match(NAMESPACE, hashes(range(16)), deadline_s=WITHIN_S, ask_peers=True) == 12
            assert await b.load(NAMESPACE, hashes(range(2)), deadline_s=5.0) == [None, None]
            loaded = await b.load(NAMESPACE, hashes(range(16)), deadline_s=30.0, allow_remote=True)
            assert loaded == [payload(n, SIZE) for n in range(12)] + [None] * 4
            # From now on they are here.
            assert await b.match(NAMESPACE, hashes(range(16)), deadline_s=WITHIN_S) == 12
            stats_a, stats_b = await a.stats(deadline_s=WITHIN_S), await b.stats(deadline_s=WITHIN_S)
            assert stats_a is not None and stats_b is not None
            assert stats_a.to_peers == stats_b.from_peers == 12 and stats_b.peer_corrupt == 0
            # Another name space, or a name that nobody has, is asked for in vain.
            assert await b.match("another", hashes(range(2)), deadline_s=5.0, ask_peers=True) == 0
            # The block's payer is the tenant who saved it.
            assert [(each.tenant, each.dram_bytes > 0) for each in stats_b.tenants] == [("t", True)]

            # One of a pair of copies goes bad on its way: it is noticed, and is a miss.
            await eventually_saved(a, range(20, 23))
            async with stub_of(address_a) as stub:
                await flip_a_byte(stub, hashes(range(20, 23)), 1)
            assert await b.load(NAMESPACE, hashes(range(20, 23)), deadline_s=30.0, allow_remote=True) == [
                payload(20, SIZE),
                None,
                None,
            ]
            stats_b = await b.stats(deadline_s=WITHIN_S)
            assert stats_b is not None and stats_b.peer_corrupt == 1

            # A peer that dies, or hangs, costs a miss and no more than the caller's deadline.
            await eventually_saved(a, range(30, 34))
            first.send_signal(signal.SIGSTOP)
            started_s = time.monotonic()
            found = await b.load(NAMESPACE, hashes(range(30, 34)), deadline_s=2.0, allow_remote=True)
            assert found == [None] * 4 and time.monotonic() - started_s < WITHIN_S
            first.kill()
            await until_peers(b, 0)
            assert await b.load(NAMESPACE, hashes(range(12)), deadline_s=30.0, allow_remote=True) == [
                payload(n, SIZE) for n in range(12)
            ]


async def flip_a_byte(stub: rpc.KvStoreAsyncStub, names: list[bytes], index: int) -> None:
    request = pb.AcquireRequest(
        namespace=NAMESPACE, block_hashes=b"".join(names), deadline_s=1.0, lease_s=1.0
    )
    acquired = await stub.Acquire(request)
    arena = acquired.arena
    ref = ArenaRef(arena_id=arena.id, path=arena.path, size_bytes=arena.size_bytes)
    attach_arena(ref).memory[acquired.blocks[index].offset + 77] ^= 1
    await stub.Release(pb.ReleaseRequest(arena_id=arena.id, lease_id=acquired.lease_id))


async def test_what_will_run_here_is_fetched_ahead_and_a_leaving_node_gives_away_what_it_has(
    tmp_path: Path, redis_url: str
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        kvstore(tmp_path / "a", redis_url, node="a", ssd_mib=0) as first,
        kvstore(tmp_path / "b", redis_url, node="b", ssd_mib=0) as second,
    ):
        address_a = (await record_of(redis_url, first)).grpc_address
        address_b = (await record_of(redis_url, second)).grpc_address
        async with (
            open_redis(redis_url) as redis,
            StoreClient.open(address_a) as a,
            StoreClient.open(address_b) as b,
        ):
            await eventually_saved(a, range(8))
            await until_peers(b)
            hints = Stream(redis, Keys("trireme").hints("b"), Hint)
            async with asyncio.timeout(WITHIN_S):
                while await b.match(NAMESPACE, hashes(range(4)), deadline_s=5.0) < 4:
                    waiting = WaitingRequest(
                        request_id="r",
                        namespace=NAMESPACE,
                        block_hashes=b"".join(hashes(range(4))),
                        runs_here=True,
                    )
                    await hints.publish(
                        Hint(
                            id="h",
                            source="s",
                            made_unix_s=time.time(),
                            request_ids=["r"],
                            start_in_s=[1.0],
                            described=[waiting],
                        )
                    )
                    await asyncio.sleep(0.2)
            stats = await b.stats(deadline_s=WITHIN_S)
            assert stats is not None and stats.from_peers == 4
            await until_peers(a)
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=WITHIN_S) == 0
            assert await b.load(NAMESPACE, hashes(range(8)), deadline_s=30.0) == [
                payload(n, SIZE) for n in range(8)
            ]


def parts_of(number: int, *, sum_off_by: int = 0, cut: int = 0) -> list[pb.BlockPart]:
    """A block as another node would send it."""
    data = payload(number, SIZE)
    head = pb.BlockHead(
        key=block_keys(NAMESPACE, block_hash(number))[0],
        payload_bytes=len(data),
        checksum=payload_checksum(data) + sum_off_by,
        tenant="t",
    )
    half = len(data) // 2
    return [pb.BlockPart(head=head, data=data[:half]), pb.BlockPart(data=data[half : len(data) - cut])]


async def test_pushed_blocks_are_checked_one_by_one(tmp_path: Path, redis_url: str) -> None:
    with kvstore(tmp_path, redis_url, ssd_mib=0) as process:
        address = (await record_of(redis_url, process)).grpc_address
        async with stub_of(address) as stub, StoreClient.open(address) as client:

            async def push(*parts: pb.BlockPart) -> int:
                async def stream() -> AsyncIterator[pb.BlockPart]:
                    for part in parts:
                        yield part

                return (await stub.Push(stream())).stored

            sent = [*parts_of(0), *parts_of(1, sum_off_by=1), *parts_of(2), *parts_of(3, cut=10)]
            assert await push(*sent) == 2
            assert await push(*parts_of(0)) == 1, "it is here already"
            loaded = [
                (await client.load(NAMESPACE, [block_hash(n)], deadline_s=WITHIN_S))[0] for n in range(4)
            ]
            assert loaded == [payload(0, SIZE), None, payload(2, SIZE), None]
            stats = await client.stats(deadline_s=WITHIN_S)
            assert stats is not None and stats.peer_corrupt == 1
            assert stats.dram.used_bytes == 2 * image_bytes(SIZE), "what was not whole was given back"
            for wrong in (
                [pb.BlockPart(data=b"x")],
                [pb.BlockPart(head=pb.BlockHead(key=b"short", payload_bytes=1))],
                [parts_of(5)[0], pb.BlockPart(data=bytes(SIZE))],
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await push(*wrong)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            # Someone who goes away in the middle leaves nothing.
            begun = asyncio.Event()

            async def endless() -> AsyncIterator[pb.BlockPart]:
                yield parts_of(6)[0]
                begun.set()
                await asyncio.sleep(600)

            call = stub.Push(endless())
            await begun.wait()
            call.cancel()
            async with asyncio.timeout(WITHIN_S):
                while (stats := await client.stats()) is None or stats.dram.used_bytes != 2 * image_bytes(
                    SIZE
                ):
                    await asyncio.sleep(0.02)
            assert await client.save(NAMESPACE, blocks(range(5, 7)), tenant="t", deadline_s=30.0) == 2
