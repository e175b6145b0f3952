"""The gRPC face of the store: decode, decide, encode."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from trireme.errors import InvalidRequest, Overloaded
from trireme.kvcache.block_codec import HASH_BYTES, block_keys
from trireme.kvcache.saves import RESERVATION_S, NewBlock, Refusal
from trireme.kvcache.stored_blocks import Block
from trireme.kvcache.tiered_store import MAX_DEADLINE_S, TieredStore
from trireme.kvstore.block_streams import Receiver, send_chain
from trireme.kvstore.figures import stats_of
from trireme.kvstore.peers import Peers
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[Any, Any]

MAX_BLOCKS = 16384
"""Blocks that one call may name; a call holds the event loop for about a microsecond per block."""
MAX_STREAMS = 8
"""Streams of blocks to and from other nodes at once."""
_REFUSALS = {
    Refusal.PRESENT: pb.RESERVATION_PRESENT,
    Refusal.NO_SPACE: pb.RESERVATION_NO_SPACE,
}


class KvStoreServicer(rpc.KvStoreServicer):
    """One store. An offset or a lease of another arena is one that has ended."""

    def __init__(self, store: TieredStore, peers: Peers, *, node: str) -> None:
        self._store = store
        self._peers = peers
        self._streams = 0
        self._node = node
        ref = store.arena.ref
        self._arena = pb.Arena(id=ref.arena_id, path=ref.path, size_bytes=ref.size_bytes)

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        _check_count(len(request.block_hashes) // HASH_BYTES)
        available, in_dram = self._store.match(request.namespace, request.block_hashes)
        reachable = available
        missing = request.block_hashes[available * HASH_BYTES :]
        if request.ask_peers and missing:
            reachable += await self._peers.match(request.namespace, missing)
        return pb.MatchResponse(available=available, in_dram=in_dram, reachable=reachable)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        _check_count(len(request.blocks))
        blocks = [
            NewBlock(block_hash=block.block_hash, payload_bytes=block.payload_bytes)
            for block in request.blocks
        ]
        await self._store.saves.prepare_room(blocks)
        outcomes = self._store.saves.reserve(request.namespace, request.tenant, blocks)
        return pb.ReserveResponse(
            arena=self._arena,
            blocks=[self._reserved(outcome) for outcome in outcomes],
            expires_in_s=RESERVATION_S,
        )

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        if not self._is_ours(request.arena_id):
            return pb.CommitResponse()
        return pb.CommitResponse(committed=self._store.saves.commit(request.generations, request.checksums))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not self._is_ours(request.arena_id):
            return pb.AbortResponse()
        return pb.AbortResponse(aborted=self._store.saves.abort(request.generations))

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> pb.AcquireResponse:
        _check_count(len(request.block_hashes) // HASH_BYTES)
        if not (request.deadline_s >= 0 and request.lease_s > 0):
            raise InvalidRequest(
                f"deadline_s={request.deadline_s} must be at least 0 and lease_s={request.lease_s} above 0",
                param="lease_s",
            )
        deadline_s = min(request.deadline_s, MAX_DEADLINE_S)
        if request.allow_remote:
            started_s = self._store.now_s()
            await self._bring(request.namespace, request.block_hashes, deadline_s=deadline_s)
            deadline_s = max(0.0, deadline_s - (self._store.now_s() - started_s))
        acquired = await self._store.acquire(
            request.namespace, request.block_hashes, deadline_s=deadline_s, lease_s=request.lease_s
        )
        return pb.AcquireResponse(
            arena=self._arena,
            blocks=[
                pb.AcquiredBlock(
                    offset=self._store.dram.payload_offset(block),
                    payload_bytes=block.payload_bytes,
                    checksum=block.checksum,
                    generation=block.generation,
                )
                for block in acquired.blocks
            ],
            lease_id=acquired.lease_id,
            lease_s=acquired.lease_s,
        )

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        if not self._is_ours(request.arena_id):
            return pb.ReleaseResponse()
        held = self._store.release(request.lease_id, corrupt_generations=request.corrupt_generations)
        return pb.ReleaseResponse(held=held)

    async def NoteSession(self, request: pb.NoteSessionRequest, context: Context) -> pb.NoteSessionResponse:
        _check_count(len(request.block_hashes) // HASH_BYTES)
        if not request.session_id:
            raise InvalidRequest("session_id is empty: name a conversation", param="session_id")
        applied = self._store.note_session(
            request.tenant,
            request.session_id,
            request.namespace,
            request.block_hashes,
            version=request.version,
        )
        return pb.NoteSessionResponse(applied=applied)

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        session = self._store.sessions.get(request.tenant, request.session_id)
        if session is None:
            return pb.GetSessionResponse()
        here = self._store.leading(session.keys)
        return pb.GetSessionResponse(
            known=True,
            namespace=session.namespace,
            block_hashes=b"".join(key[16:] for key in session.keys),
            version=session.version,
            available=len(here),
            in_dram=len(list(itertools.takewhile(lambda block: block.in_dram, here))),
            payload_bytes=sum(block.payload_bytes for block in here),
            idle_s=self._store.now_s() - session.used_s,
        )

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.BlockPart]:
        _check_count(len(request.block_hashes) // HASH_BYTES)
        with self._stream():
            chain = send_chain(
                self._store,
                request.namespace,
                request.block_hashes,
                deadline_s=request.deadline_s,
                counters=self._peers.counters,
            )
            async for part in chain:
                yield part

    async def Push(self, request: AsyncIterator[pb.BlockPart], context: Context) -> pb.PushResponse:
        receiver = Receiver(self._store, self._peers.counters)
        with self._stream():
            try:
                async for part in request:
                    await receiver.take(part)
            finally:
                receiver.finish()
        return pb.PushResponse(stored=receiver.stored)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        return stats_of(self._store, self._peers.counters, node=self._node)

    async def _bring(self, namespace: str, block_hashes: bytes, *, deadline_s: float) -> None:
        here = len(self._store.leading(block_keys(namespace, block_hashes)))
        missing = block_hashes[here * HASH_BYTES :]
        if missing and self._store.peers:
            await self._peers.pull(namespace, missing, deadline_s=deadline_s)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if self._streams >= MAX_STREAMS:
            raise Overloaded(f"{MAX_STREAMS} streams of blocks run already", retry_after_s=1.0)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def _is_ours(self, arena_id: bytes) -> bool:
        return arena_id == self._arena.id

    def _reserved(self, outcome: Block | Refusal) -> pb.ReservedBlock:
        if isinstance(outcome, Refusal):
            return pb.ReservedBlock(outcome=_REFUSALS[outcome])
        return pb.ReservedBlock(
            outcome=pb.RESERVATION_RESERVED,
            offset=self._store.dram.payload_offset(outcome),
            generation=outcome.generation,
        )


def _check_count(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InvalidRequest(
            f"a call names {blocks} blocks, more than {MAX_BLOCKS}: ask in parts", param="block_hashes"
        )
