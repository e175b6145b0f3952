"""News on its way to gateways: one outbox each, coalescing while a gateway is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from trireme.wire.worker.v1.worker_pb2 import SequenceUpdate, TokenBatch
from trireme.worker.live_requests import LiveRequest

MAX_UPDATES = 4096
"""Updates in one message, so that it stays far below the message limit."""


class Outbox:
    """What one gateway has to be told."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._dirty: dict[str, LiveRequest] = {}
        self._unknown: list[str] = []
        self._event = asyncio.Event()
        self.stream: object | None = None
        """The connection that is served now; a newer one replaces it."""

    @property
    def is_connected(self) -> bool:
        return self.stream is not None

    def mark(self, request: LiveRequest) -> None:
        """The request has news."""
        self._dirty[request.request_id] = request
        self._event.set()

    def mark_unknown(self, request_id: str) -> None:
        """The gateway asked for something that is not here."""
        self._unknown.append(request_id)
        self._event.set()

    def forget(self, request_id: str) -> None:
        self._dirty.pop(request_id, None)

    def displace(self) -> None:
        """Wake the present stream so that it sees its successor."""
        self._event.set()

    async def batches(self, stream: object, *, until: asyncio.Task[None]) -> AsyncIterator[TokenBatch]:
        """Messages for one connection, until another takes its place or `until` is done."""
        while self.stream is stream and not until.done():
            if not self._dirty and not self._unknown:
                self._event.clear()
                await self._event.wait()
                continue
            updates: list[SequenceUpdate] = []
            while self._dirty and len(updates) < MAX_UPDATES:
                _, request = self._dirty.popitem()
                updates.extend(request.news())
            unknown, self._unknown = self._unknown, []
            if updates or unknown:
                yield TokenBatch(updates=updates, worker_id=self._worker_id, unknown=unknown)
