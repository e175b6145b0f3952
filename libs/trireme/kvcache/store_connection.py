"""A process's connection to its node's KV store: the channel, the mapped arena, and who is to blame.

After a failure the store is left alone for a moment, so that a store that hangs does not cost each
request its deadline.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from trireme.kvcache.arena import Arena, ArenaRef, attach_arena
from trireme.kvcache.residency_index import ResidencyReader
from trireme.runtime.tls import fleet_stamp, open_channel
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

log = logging.getLogger(__name__)

R = TypeVar("R")

AddressSource = Callable[[], Awaitable[str | None]]
"""Where the store listens now; None where none is known. Asked at first and after each failure,
since a restarted store may have moved; may fail or hang, which only means that it is not known."""

CALL_S = 1.0
ALIVE_S = 3.0
"""A store whose heartbeat is older is not believed to hold anything."""
_LOOKUP_S = 0.5
_OLD_CHANNEL_S = 30.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_ATTACH_S = 0.5
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


class CallFailed(Exception):
    """A call had no result; the reason is counted."""


class StoreConnection:
    """One per client; its methods belong to one event loop."""

    def __init__(self, address: AddressSource, counters: StoreClientCounters) -> None:
        self._counters = counters
        self._address = address
        self._connected_to: tuple[str, object] | None = None
        self._in_doubt = True
        self._channel: grpc.aio.Channel | None = None
        self._stub: rpc.KvStoreAsyncStub | None = None
        self._arena: Arena | None = None
        self._reader: ResidencyReader | None = None
        self._stop_prefault = threading.Event()
        self._pause_s = 0.0
        self._paused_until_s = 0.0
        self._running: set[asyncio.Task[Any]] = set()

    def residency(self) -> tuple[ResidencyReader, Arena] | None:
        """The node's residency index and its arena, where a living store shows them."""
        if self._arena is None or self._reader is None:
            return None
        alive = self._arena.is_alive(time.monotonic_ns(), within_ns=int(ALIVE_S * 1e9))
        return (self._reader, self._arena) if alive else None

    async def stay_attached(self) -> None:
        """Map the arena of the store that is there now, for ever."""
        while True:
            if self.residency() is None and time.monotonic() >= self._paused_until_s:
                try:
                    stats = await self.call(lambda stub: stub.GetStats(pb.GetStatsRequest(), timeout=CALL_S))
                    self.mapped(stats.arena)
                except CallFailed:
                    pass
            await asyncio.sleep(_ATTACH_S)

    async def call(self, call: Callable[[rpc.KvStoreAsyncStub], Awaitable[R]]) -> R:
        """The answer of a call.

        Raises:
            CallFailed: there is none; the reason is counted.
        """
        stub = await self._current_stub()
        try:
            response = await call(stub)
        except grpc.aio.AioRpcError as error:
            self._note_failure(error)
            raise CallFailed from error
        self._pause_s = 0.0
        return response

    def mapped(self, arena: pb.Arena) -> Arena:
        """The arena that a response speaks of.

        Raises:
            CallFailed: it cannot be mapped.
        """
        if self._arena is None or self._arena.ref.arena_id != arena.id:
            ref = ArenaRef(arena_id=arena.id, path=arena.path, size_bytes=arena.size_bytes)
            try:
                self._arena = attach_arena(ref)
            except OSError as error:
                self._counters.failures["arena"] += 1
                log.warning("kv_arena_unreachable", extra={"path": arena.path, "error": str(error)})
                raise CallFailed from error
            self._reader = ResidencyReader(self._arena.index)
            self._stop_prefault.set()
            self._stop_prefault = threading.Event()
            prefault = functools.partial(self._arena.prefault, self._stop_prefault)
            self.start(asyncio.to_thread(prefault))
        return self._arena

    async def within(self, work: Coroutine[Any, Any, None], deadline_s: float) -> None:
        """Work for so long, and let it go on behind the caller's back if it takes longer."""
        # The work is not cancelled at the deadline: a thread may be copying, and the room it
        # copies to must not be given back before it ends.
        task = self.start(work)
        _, late = await asyncio.wait({task}, timeout=deadline_s)
        if late:
            self._counters.failures["deadline"] += 1

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work in the background; failures are counted."""
        task = asyncio.create_task(self._guarded(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        """End what runs, with a moment for giving back room in the arena."""
        self._stop_prefault.set()
        if self._running:
            await asyncio.wait(self._running, timeout=CALL_S)
        for task in self._running:
            task.cancel()
        if self._channel is not None:
            await self._channel.close(None)
        self._channel, self._stub, self._arena, self._reader = None, None, None, None

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except CallFailed:
            return
        except Exception:
            # The engine goes on without the store, whatever is wrong here.
            self._counters.failures["bug"] += 1
            log.exception("kv_client_failed")

    async def _current_stub(self) -> rpc.KvStoreAsyncStub:
        if time.monotonic() < self._paused_until_s:
            self._counters.failures["paused"] += 1
            raise CallFailed
        if self._in_doubt:
            address = await self._look_up()
            if address is None:
                self._counters.failures["away"] += 1
                self._pause()
                raise CallFailed
            wanted = (address, fleet_stamp())
            if wanted != self._connected_to:
                older, self._connected_to = self._channel, wanted
                self._channel = open_channel(address, _CHANNEL_OPTIONS)
                self._stub = rpc.KvStoreStub(self._channel)
                if older is not None:
                    # Calls still on it end by their own deadlines; cutting them off would cancel callers.
                    self.start(older.close(_OLD_CHANNEL_S))
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
            self._counters.failures["refused"] += 1
            log.warning("kv_store_refused", extra={"code": code.name, "error": error.details()})
            return
        away = code is grpc.StatusCode.UNAVAILABLE
        self._counters.failures["away" if away else "deadline"] += 1
        self._pause()
