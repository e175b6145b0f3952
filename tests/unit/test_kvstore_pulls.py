"""Pulls of one chain from another node that meet: each ends with all that either of them brings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.kvstore_support import NAMESPACE, block_hash, opened_store, payload
from trireme.kvcache.block_codec import HASH_BYTES, block_keys, payload_checksum
from trireme.kvcache.stored_blocks import MAX_RUN_BLOCKS
from trireme.kvstore.peers import Peers
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

BLOCKS = MAX_RUN_BLOCKS + 16
CHAIN = b"".join(map(block_hash, range(BLOCKS)))
KEYS = block_keys(NAMESPACE, CHAIN)
SIZE = 1000


class SlowPeer(rpc.KvStoreServicer):
    """Has the whole chain; of its first stream the end waits."""

    def __init__(self, *, breaks: bool) -> None:
        self.go_on = asyncio.Event()
        self.fetches = 0
        self._breaks = breaks

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchResponse:
        return pb.MatchResponse(available=len(request.block_hashes) // HASH_BYTES)

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.BlockPart]:
        self.fetches += 1
        is_first = self.fetches == 1
        for key in block_keys(NAMESPACE, request.block_hashes):
            number = KEYS.index(key)
            if is_first and number == MAX_RUN_BLOCKS + 4:  # the last few have come, but are no run yet
                await self.go_on.wait()
                if self._breaks:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "it dies")
            data = payload(number, SIZE)
            head = pb.BlockHead(key=key, payload_bytes=SIZE, checksum=payload_checksum(data), tenant="t")
            yield pb.BlockPart(head=head, data=data)


@asynccontextmanager
async def serving(peer: SlowPeer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    rpc.add_KvStoreServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize("breaks", [False, True])
async def test_a_pull_waits_for_what_another_is_receiving(tmp_path: Path, breaks: bool) -> None:
    slow = SlowPeer(breaks=breaks)
    async with serving(slow) as address, opened_store(tmp_path, dram_bytes=2**20) as store:
        peers = Peers(store, process_id="b", fleet="f")
        peers.know([ProcessRecord(id="a", node="a", fleet="f", grpc_address=address)])
        try:
            ahead = asyncio.create_task(peers.pull(NAMESPACE, CHAIN, deadline_s=60.0))
            async with asyncio.timeout(60.0):
                while len(store.leading(KEYS)) < MAX_RUN_BLOCKS:
                    await asyncio.sleep(0.01)
            rest = CHAIN[MAX_RUN_BLOCKS * HASH_BYTES :]
            reader = asyncio.create_task(peers.pull(NAMESPACE, rest, deadline_s=60.0))
            # Time for a pull that does not wait to come back with less.
            asyncio.get_running_loop().call_later(0.2, slow.go_on.set)
            found = await reader
            # Where the first stream breaks, what it had received counts, and the peer is left alone.
            assert found == (4 if breaks else BLOCKS - MAX_RUN_BLOCKS)
            assert len(store.leading(KEYS)) == MAX_RUN_BLOCKS + found
            assert await ahead == MAX_RUN_BLOCKS + found
            assert slow.fetches == 1
        finally:
            peers.know([])
