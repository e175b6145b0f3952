"""The worker's way to its node's KV store.

Invariant: whatever becomes of the store, a caller sees misses and zeros, within its
deadline, and never an exception; `counters` say why.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from trireme.kvcache.arena_copies import CopyFault, copy_all, copy_chain
from trireme.kvcache.block_codec import Buffer, join_hashes
from trireme.kvcache.direct_copies import HeldChain, Room
from trireme.kvcache.store_connection import (
    CALL_S,
    AddressSource,
    CallFailed,
    StoreClientCounters,
    StoreConnection,
)
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

R = TypeVar("R")

_BLOCKS_PER_CALL = 64
_INLINE_BYTES = 64 * 1024
"""Copies of up to so many bytes are quicker than a thread's wake-up."""
_LEASE_MARGIN_S = 1.0
_ANSWER_MARGIN_S = 0.01


class StoreClient:
    """One client per worker process; its methods belong to one event loop."""

    def __init__(self, address: AddressSource) -> None:
        self.counters = StoreClientCounters()
        self._connection = StoreConnection(address, self.counters)

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str | AddressSource) -> AsyncIterator[StoreClient]:
        """A client of the store at `address`, which need not be there yet; let go of at the end."""

        async def fixed() -> str | None:
            return address if isinstance(address, str) else None

        client = cls(fixed if isinstance(address, str) else address)
        attached = asyncio.create_task(client._connection.stay_attached())
        try:
            yield client
        finally:
            attached.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attached
            await client._connection.close()

    @property
    def has_peers(self) -> bool:
        """Whether the store can ask those of other nodes: `match` may find more than `match_local` then."""
        shown = self._connection.residency()
        return shown is not None and shown[1].peers > 0

    def match_local(self, namespace: str, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a chain the node's store seems to hold; asks nobody.

        A hint from shared memory, in microseconds: it may be stale either way. 0 where no store lives.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        return self.match_local_tiers(namespace, hashes)[0]

    def match_local_tiers(self, namespace: str, hashes: Sequence[bytes]) -> tuple[int, int]:
        """As `match_local`: the leading blocks in any tier, and those in DRAM.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        shown = self._connection.residency()
        if shown is None:
            return 0, 0
        reader, arena = shown
        available, in_dram = reader.match(namespace, join_hashes(hashes))
        return (available if arena.is_ssd_on else in_dram), in_dram

    async def match(
        self, namespace: str, hashes: Sequence[bytes], *, deadline_s: float = 0.25, ask_peers: bool = False
    ) -> int:
        """How many leading blocks of a chain the store can give; 0 where it does not answer.

        With `ask_peers` those count that another node's store has and `load(allow_remote=True)` would get.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        request = pb.MatchRequest(namespace=namespace, block_hashes=join_hashes(hashes), ask_peers=ask_peers)
        try:
            response = await self._connection.call(lambda stub: stub.Match(request, timeout=deadline_s))
        except CallFailed:
            return 0
        self.counters.matched_blocks += response.reachable
        return response.reachable

    async def load(
        self, namespace: str, hashes: Sequence[bytes], *, deadline_s: float, allow_remote: bool = False
    ) -> list[bytes | None]:
        """The payloads of a chain, None from the first miss on; one entry per hash.

        A block that does not come within `deadline_s` is a miss. With `allow_remote` blocks that are not on
        this node are fetched from another one.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        join_hashes(hashes)
        found: list[bytes] = []
        work = self._load(namespace, list(hashes), found, deadline_s, allow_remote)
        await self._connection.within(work, deadline_s)
        self.counters.loaded_blocks += len(found)
        self.counters.loaded_bytes += sum(map(len, found))
        # A copy: what a late thread still appends is not for this caller.
        return [*found, *[None] * (len(hashes) - len(found))]

    async def hold(
        self,
        namespace: str,
        hashes: Sequence[bytes],
        *,
        deadline_s: float,
        lease_s: float = 10.0,
        allow_remote: bool = False,
    ) -> HeldChain | None:
        """The leading blocks of a chain, to be copied from shared memory by the caller; None where none is.

        `let_go` of it when all is copied; the store keeps it for `lease_s` at most.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        request = pb.AcquireRequest(
            namespace=namespace,
            block_hashes=join_hashes(hashes),
            deadline_s=max(0.0, deadline_s - _ANSWER_MARGIN_S),
            lease_s=lease_s,
            allow_remote=allow_remote,
        )
        started_s = time.monotonic()
        try:
            acquired = await self._connection.call(
                functools.partial(_acquire, request=request, timeout_s=deadline_s)
            )
            if not acquired.blocks:
                return None
            arena = self._connection.mapped(acquired.arena)
        except CallFailed:
            return None
        ends_s = started_s + acquired.lease_s
        held = HeldChain(arena, list(acquired.blocks), acquired.lease_id, ends_s=ends_s)
        self.counters.loaded_blocks += len(held)
        self.counters.loaded_bytes += sum(map(len, held.views))
        return held

    def let_go(self, held: HeldChain) -> None:
        """End a lease, and report the blocks whose bytes were wrong."""
        self.counters.failures["corrupt"] += len(held.corrupt_generations)
        request = pb.ReleaseRequest(
            arena_id=held.arena_id, lease_id=held.lease_id, corrupt_generations=held.corrupt_generations
        )
        self._connection.start(self._release(request))

    async def reserve(
        self, namespace: str, blocks: Sequence[tuple[bytes, int]], *, tenant: str, deadline_s: float = CALL_S
    ) -> Room | None:
        """Room for new blocks (hash, bytes of the payload), first of the chain first; None without a store.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        join_hashes([block_hash for block_hash, _ in blocks])
        request = pb.ReserveRequest(
            namespace=namespace,
            tenant=tenant,
            blocks=[pb.NewBlock(block_hash=block_hash, payload_bytes=size) for block_hash, size in blocks],
        )
        try:
            reserved = await self._connection.call(lambda stub: stub.Reserve(request, timeout=deadline_s))
            arena = self._connection.mapped(reserved.arena)
        except CallFailed:
            return None
        refused = sum(block.outcome == pb.RESERVATION_NO_SPACE for block in reserved.blocks)
        if refused:
            self.counters.failures["refused"] += refused
        return Room(arena, list(reserved.blocks), [size for _, size in blocks])

    async def commit(self, room: Room, *, deadline_s: float = CALL_S) -> int:
        """Make a room's sealed blocks readable and give back the rest; returns how many are readable now."""
        if unsealed := room.unsealed:
            self._connection.start(self._abort(pb.AbortRequest(arena_id=room.arena_id, generations=unsealed)))
        sealed = room.sealed
        if not sealed:
            return 0
        request = pb.CommitRequest(
            arena_id=room.arena_id, generations=sealed.keys(), checksums=sealed.values()
        )
        try:
            committed = await self._connection.call(lambda stub: stub.Commit(request, timeout=deadline_s))
        except CallFailed:
            return 0
        self.counters.saved_blocks += committed.committed
        self.counters.saved_bytes += sum(len(view) for view in room.views if view is not None)
        return committed.committed

    async def save(
        self,
        namespace: str,
        blocks: Sequence[tuple[bytes, Buffer]],
        *,
        tenant: str,
        deadline_s: float = 2.0,
    ) -> int:
        """Store blocks (hash, payload), first of the chain first; returns how many the store has now.

        Payloads are read until the call returns, or, past the deadline, a moment longer:
        pass memory that is not changed meanwhile, or whose change costs no more than a miss.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        join_hashes([block_hash for block_hash, _ in blocks])
        flat = [(block_hash, memoryview(payload).cast("B")) for block_hash, payload in blocks]
        stored: list[int] = []
        await self._connection.within(self._save(namespace, flat, tenant, stored), deadline_s)
        return sum(stored)

    async def note_session(
        self, tenant: str, session_id: str, namespace: str, hashes: Sequence[bytes], *, version: int
    ) -> bool:
        """Say which chain a conversation's turn ended with; False where a later one was noted.

        `version` orders the turns: the time the turn ended, in microseconds since 1970.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        request = pb.NoteSessionRequest(
            tenant=tenant,
            session_id=session_id,
            namespace=namespace,
            block_hashes=join_hashes(hashes),
            version=version,
        )
        try:
            response = await self._connection.call(lambda stub: stub.NoteSession(request, timeout=CALL_S))
        except CallFailed:
            return False
        return response.applied

    async def session(
        self, tenant: str, session_id: str, *, deadline_s: float = CALL_S
    ) -> pb.GetSessionResponse | None:
        """What is known of a conversation, and what of it is here; None where the store does not answer."""
        request = pb.GetSessionRequest(tenant=tenant, session_id=session_id)
        try:
            return await self._connection.call(lambda stub: stub.GetSession(request, timeout=deadline_s))
        except CallFailed:
            return None

    async def stats(self, *, deadline_s: float = 1.0) -> pb.GetStatsResponse | None:
        """The store's figures; None where it does not answer."""
        request = pb.GetStatsRequest()
        try:
            return await self._connection.call(lambda stub: stub.GetStats(request, timeout=deadline_s))
        except CallFailed:
            return None

    async def _load(
        self, namespace: str, hashes: list[bytes], found: list[bytes], deadline_s: float, allow_remote: bool
    ) -> None:
        end_s = time.monotonic() + deadline_s
        for start in range(0, len(hashes), _BLOCKS_PER_CALL):
            part = hashes[start : start + _BLOCKS_PER_CALL]
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            request = pb.AcquireRequest(
                namespace=namespace,
                block_hashes=join_hashes(part),
                deadline_s=max(0.0, left_s - _ANSWER_MARGIN_S),
                lease_s=left_s + _LEASE_MARGIN_S,
                allow_remote=allow_remote,
            )
            acquired = await self._connection.call(
                functools.partial(_acquire, request=request, timeout_s=left_s)
            )
            if not acquired.blocks:
                return
            payloads = await self._copy_acquired(acquired)
            found.extend(payloads)
            if len(payloads) < len(part):
                return

    async def _copy_acquired(self, acquired: pb.AcquireResponse) -> list[bytes]:
        corrupt = []
        try:
            arena = self._connection.mapped(acquired.arena)
            size = sum(block.payload_bytes for block in acquired.blocks)
            blocks = list(acquired.blocks)
            payloads, fault = await _in_thread_if_large(size, lambda: copy_chain(arena, blocks))
            if fault is not None:
                block, reason = fault
                self.counters.failures[reason.value] += 1
                # While the lease holds, a slot with another generation is as wrong as one with other bytes.
                if reason is not CopyFault.OUTSIDE:
                    corrupt.append(block.generation)
            return payloads
        finally:
            release = pb.ReleaseRequest(
                arena_id=acquired.arena.id, lease_id=acquired.lease_id, corrupt_generations=corrupt
            )
            self._connection.start(self._release(release))

    async def _release(self, request: pb.ReleaseRequest) -> None:
        await self._connection.call(lambda stub: stub.Release(request, timeout=CALL_S))

    async def _save(
        self, namespace: str, blocks: list[tuple[bytes, memoryview]], tenant: str, stored: list[int]
    ) -> None:
        for start in range(0, len(blocks), _BLOCKS_PER_CALL):
            part = blocks[start : start + _BLOCKS_PER_CALL]
            stored.append(await self._save_part(namespace, part, tenant))

    async def _save_part(self, namespace: str, part: list[tuple[bytes, memoryview]], tenant: str) -> int:
        request = pb.ReserveRequest(
            namespace=namespace,
            tenant=tenant,
            blocks=[
                pb.NewBlock(block_hash=block_hash, payload_bytes=len(payload)) for block_hash, payload in part
            ],
        )
        reserved = await self._connection.call(lambda stub: stub.Reserve(request, timeout=CALL_S))
        present = sum(block.outcome == pb.RESERVATION_PRESENT for block in reserved.blocks)
        room = [
            (block, payload)
            for block, (_, payload) in zip(reserved.blocks, part, strict=True)
            if block.outcome == pb.RESERVATION_RESERVED
        ]
        if refused := len(part) - present - len(room):
            self.counters.failures["refused"] += refused
        if not room:
            return present
        arena_id, size = reserved.arena.id, sum(len(payload) for _, payload in room)
        unwritten = [block.generation for block, _ in room]
        written: list[int] = []
        checksums: list[int] = []
        try:
            arena = self._connection.mapped(reserved.arena)
            written, checksums, unwritten = await _in_thread_if_large(size, lambda: copy_all(arena, room))
        finally:
            if unwritten:
                abort = pb.AbortRequest(arena_id=arena_id, generations=unwritten)
                self._connection.start(self._abort(abort))
        commit = pb.CommitRequest(arena_id=arena_id, generations=written, checksums=checksums)
        committed = await self._connection.call(lambda stub: stub.Commit(commit, timeout=CALL_S))
        self.counters.saved_blocks += committed.committed
        if committed.committed == len(room):
            self.counters.saved_bytes += size
        return present + committed.committed

    async def _abort(self, request: pb.AbortRequest) -> None:
        await self._connection.call(lambda stub: stub.Abort(request, timeout=CALL_S))


async def _acquire(
    stub: rpc.KvStoreAsyncStub, *, request: pb.AcquireRequest, timeout_s: float
) -> pb.AcquireResponse:
    return await stub.Acquire(request, timeout=timeout_s)


async def _in_thread_if_large(size_bytes: int, work: Callable[[], R]) -> R:
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)
