"""The worker's way to its node's KV store.

Invariant: whatever becomes of the store, a caller sees misses and zeros, within its
deadline, and never an exception; `counters` say why. After a failure the store is left
alone for a moment, so that a store that hangs does not cost each request its deadline.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from trireme.kvcache.arena import Arena, ArenaRef, attach_arena
from trireme.kvcache.arena_copies import CopyFault, copy_all, copy_chain
from trireme.kvcache.block_codec import Buffer, join_hashes, payload_checksum
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

log = logging.getLogger(__name__)

R = TypeVar("R")

AddressSource = Callable[[], Awaitable[str | None]]
"""Where the store listens now; None where none is known. Asked at first and after each failure,
since a restarted store may have moved; may fail or hang, which only means that it is not known."""

_BLOCKS_PER_CALL = 64
_INLINE_BYTES = 64 * 1024
"""Copies of up to so many bytes are quicker than a thread's wake-up."""
_CALL_S = 1.0
_LOOKUP_S = 0.5
_OLD_CHANNEL_S = 30.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_LEASE_MARGIN_S = 1.0
_ANSWER_MARGIN_S = 0.01
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 16 * 2**20),
    # Each client its own connection: a subchannel shared by address would share its backoff.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class StoreClientCounters:
    """What was asked and what came of it, since the client was opened."""

    matched_blocks: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    saved_blocks: int = 0
    saved_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By reason: away, deadline, paused, refused, arena, reused, corrupt, outside, bug."""


class _Failed(Exception):
    """A call had no result; the reason is counted."""


class StoreClient:
    """One client per worker process; its methods belong to one event loop."""

    def __init__(self, address: AddressSource) -> None:
        self.counters = StoreClientCounters()
        self._address = address
        self._connected_to: str | None = None
        self._in_doubt = True
        self._channel: grpc.aio.Channel | None = None
        self._stub: rpc.KvStoreAsyncStub | None = None
        self._arena: Arena | None = None
        self._stop_prefault = threading.Event()
        self._pause_s = 0.0
        self._paused_until_s = 0.0
        self._running: set[asyncio.Task[Any]] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str | AddressSource) -> AsyncIterator[StoreClient]:
        """A client of the store at `address`, which need not be there yet; let go of at the end."""

        async def fixed() -> str | None:
            return address if isinstance(address, str) else None

        client = cls(fixed if isinstance(address, str) else address)
        try:
            yield client
        finally:
            await client._close()

    async def match(self, namespace: str, hashes: Sequence[bytes], *, deadline_s: float = 0.25) -> int:
        """How many leading blocks of a chain the store holds; 0 where it does not answer.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        request = pb.MatchRequest(namespace=namespace, block_hashes=join_hashes(hashes))
        try:
            response = await self._call(lambda stub: stub.Match(request, timeout=deadline_s))
        except _Failed:
            return 0
        self.counters.matched_blocks += response.available
        return response.available

    async def load(
        self, namespace: str, hashes: Sequence[bytes], *, deadline_s: float
    ) -> list[bytes | None]:
        """The payloads of a chain, None from the first miss on; one entry per hash.

        A block that does not come within `deadline_s` is a miss.

        Raises:
            ValueError: a hash has not 16 bytes.
        """
        join_hashes(hashes)
        found: list[bytes] = []
        await self._within(self._load(namespace, list(hashes), found, deadline_s), deadline_s)
        self.counters.loaded_blocks += len(found)
        self.counters.loaded_bytes += sum(map(len, found))
        # A copy: what a late thread still appends is not for this caller.
        return [*found, *[None] * (len(hashes) - len(found))]

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
        await self._within(self._save(namespace, flat, tenant, stored), deadline_s)
        return sum(stored)

    async def stats(self, *, deadline_s: float = 1.0) -> pb.GetStatsResponse | None:
        """The store's figures; None where it does not answer."""
        request = pb.GetStatsRequest()
        try:
            return await self._call(lambda stub: stub.GetStats(request, timeout=deadline_s))
        except _Failed:
            return None

    async def _close(self) -> None:
        self._stop_prefault.set()
        # What runs may hold room in the arena: it gets a moment to give it back.
        if self._running:
            await asyncio.wait(self._running, timeout=_CALL_S)
        for task in self._running:
            task.cancel()
        if self._channel is not None:
            await self._channel.close(None)
        self._channel, self._stub, self._arena = None, None, None

    async def _load(
        self, namespace: str, hashes: list[bytes], found: list[bytes], deadline_s: float
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
            )
            acquired = await self._call(functools.partial(_acquire, request=request, timeout_s=left_s))
            if not acquired.blocks:
                return
            payloads = await self._copy_acquired(acquired)
            found.extend(payloads)
            if len(payloads) < len(part):
                return

    async def _copy_acquired(self, acquired: pb.AcquireResponse) -> list[bytes]:
        corrupt = []
        try:
            arena = await self._mapped(acquired.arena)
            size = sum(block.payload_bytes for block in acquired.blocks)
            blocks = list(acquired.blocks)
            payloads, fault = await _in_thread_if_large(size, lambda: copy_chain(arena, blocks))
            if fault is not None:
                block, reason = fault
                self.counters.failures[reason.value] += 1
                if reason is CopyFault.CORRUPT:
                    corrupt.append(block.generation)
            return payloads
        finally:
            release = pb.ReleaseRequest(
                arena_id=acquired.arena.id, lease_id=acquired.lease_id, corrupt_generations=corrupt
            )
            self._start(self._release(release))

    async def _release(self, request: pb.ReleaseRequest) -> None:
        await self._call(lambda stub: stub.Release(request, timeout=_CALL_S))

    async def _save(
        self, namespace: str, blocks: list[tuple[bytes, memoryview]], tenant: str, stored: list[int]
    ) -> None:
        for start in range(0, len(blocks), _BLOCKS_PER_CALL):
            part = blocks[start : start + _BLOCKS_PER_CALL]
            stored.append(await self._save_part(namespace, part, tenant))

    async def _save_part(self, namespace: str, part: list[tuple[bytes, memoryview]], tenant: str) -> int:
        size = sum(len(payload) for _, payload in part)
        sums = await _in_thread_if_large(size, lambda: [payload_checksum(payload) for _, payload in part])
        request = pb.ReserveRequest(
            namespace=namespace,
            tenant=tenant,
            blocks=[
                pb.NewBlock(block_hash=block_hash, payload_bytes=len(payload), checksum=checksum)
                for (block_hash, payload), checksum in zip(part, sums, strict=True)
            ],
        )
        reserved = await self._call(lambda stub: stub.Reserve(request, timeout=_CALL_S))
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
        arena_id = reserved.arena.id
        unwritten = [block.generation for block, _ in room]
        written: list[int] = []
        try:
            arena = await self._mapped(reserved.arena)
            written, unwritten = await _in_thread_if_large(size, lambda: copy_all(arena, room))
        finally:
            if unwritten:
                self._start(self._abort(pb.AbortRequest(arena_id=arena_id, generations=unwritten)))
        commit = pb.CommitRequest(arena_id=arena_id, generations=written)
        committed = await self._call(lambda stub: stub.Commit(commit, timeout=_CALL_S))
        self.counters.saved_blocks += committed.committed
        if committed.committed == len(room):
            self.counters.saved_bytes += sum(len(payload) for _, payload in room)
        return present + committed.committed

    async def _abort(self, request: pb.AbortRequest) -> None:
        await self._call(lambda stub: stub.Abort(request, timeout=_CALL_S))

    async def _within(self, work: Coroutine[Any, Any, None], deadline_s: float) -> None:
        # The work is not cancelled at the deadline: a thread may be copying, and the room it
        # copies to must not be given back before it ends.
        task = self._start(work)
        _, late = await asyncio.wait({task}, timeout=deadline_s)
        if late:
            self.counters.failures["deadline"] += 1

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except _Failed:
            return
        except Exception:
            # The engine goes on without the store, whatever is wrong here.
            self.counters.failures["bug"] += 1
            log.exception("kv_client_failed")

    async def _call(self, call: Callable[[rpc.KvStoreAsyncStub], Awaitable[R]]) -> R:
        stub = await self._current_stub()
        try:
            response = await call(stub)
        except grpc.aio.AioRpcError as error:
            self._note_failure(error)
            raise _Failed from error
        self._pause_s = 0.0
        return response

    async def _current_stub(self) -> rpc.KvStoreAsyncStub:
        if time.monotonic() < self._paused_until_s:
            self.counters.failures["paused"] += 1
            raise _Failed
        if self._in_doubt:
            address = await self._look_up()
            if address is None:
                self.counters.failures["away"] += 1
                self._pause()
                raise _Failed
            if address != self._connected_to:
                older, self._connected_to = self._channel, address
                self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
                self._stub = rpc.KvStoreStub(self._channel)
                if older is not None:
                    # Calls still on it end by their own deadlines; cutting them off would cancel callers.
                    self._start(older.close(_OLD_CHANNEL_S))
            self._in_doubt = False
        assert self._stub is not None
        return self._stub

    async def _look_up(self) -> str | None:
        try:
            async with asyncio.timeout(_LOOKUP_S):
                return await self._address()
        except Exception as error:
            # Whatever the source runs into (Redis away, say), the store is merely not known now.
            log.warning("kv_store_not_found", extra={"error": repr(error)})
            return None

    def _pause(self) -> None:
        self._in_doubt = True
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self._paused_until_s = time.monotonic() + self._pause_s

    def _note_failure(self, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            self.counters.failures["refused"] += 1
            log.warning("kv_store_refused", extra={"code": code.name, "error": error.details()})
            return
        away = code is grpc.StatusCode.UNAVAILABLE
        self.counters.failures["away" if away else "deadline"] += 1
        self._pause()

    async def _mapped(self, arena: pb.Arena) -> Arena:
        if self._arena is None or self._arena.ref.arena_id != arena.id:
            ref = ArenaRef(arena_id=arena.id, path=arena.path, size_bytes=arena.size_bytes)
            try:
                self._arena = attach_arena(ref)
            except OSError as error:
                self.counters.failures["arena"] += 1
                log.warning("kv_arena_unreachable", extra={"path": arena.path, "error": str(error)})
                raise _Failed from error
            self._stop_prefault.set()
            self._stop_prefault = threading.Event()
            self._start(asyncio.to_thread(self._arena.prefault, self._stop_prefault))
        return self._arena


async def _acquire(
    stub: rpc.KvStoreAsyncStub, *, request: pb.AcquireRequest, timeout_s: float
) -> pb.AcquireResponse:
    return await stub.Acquire(request, timeout=timeout_s)


async def _in_thread_if_large(size_bytes: int, work: Callable[[], R]) -> R:
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)
