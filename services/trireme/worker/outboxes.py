"""News on its way to gateways: one outbox each, coalescing where the engine is fast or a gateway slow."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable

from trireme.wire.worker.v1.worker_pb2 import SequenceUpdate, TokenBatch
from trireme.worker.live_requests import Columns, LiveRequest

MAX_UPDATES = 4096
"""Updates, and unknown ids, in one message."""
MAX_BATCH_BYTES = 4 * 2**20
"""A message ends after the request that brings it to so much: far below the server's limit of
`MAX_MESSAGE_BYTES`, since one request's part of it is bounded too."""
ROW_BYTES = 20
"""A plain token at most: three numbers of variable length."""
PACE_S = 0.02
"""Least time between two messages of which the second only goes on with answers: as long as a gateway
merges them for its clients, who lose nothing. A first token, an end and whatever else is news goes at
once, and an engine slower than this is never waited for."""


class Outbox:
    """What one gateway has to be told."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._dirty: dict[LiveRequest, None] = {}
        self._unknown: OrderedDict[str, None] = OrderedDict()
        self._event = asyncio.Event()
        """Something is due."""
        self._timer: asyncio.TimerHandle | None = None
        self._paced_until_s = 0.0
        self.stream: object | None = None
        """The connection that is served now; a newer one replaces it."""

    @property
    def is_connected(self) -> bool:
        return self.stream is not None

    def mark(self, *requests: LiveRequest) -> None:
        """The requests have news."""
        self._dirty.update(dict.fromkeys(requests))
        self._event.set()

    def mark_soon(self, requests: Iterable[LiveRequest]) -> None:
        """The requests have plain tokens that follow others."""
        self._dirty.update(dict.fromkeys(requests))
        if self._event.is_set() or self._timer is not None:
            return
        left_s = self._paced_until_s - time.monotonic()
        if left_s <= 0:
            self._event.set()
        else:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._is_due)

    def _is_due(self) -> None:
        self._timer = None
        self._event.set()

    def mark_unknown(self, request_id: str) -> None:
        """The gateway asked for something that is not here."""
        self._unknown[request_id] = None
        self._event.set()

    def forget(self, request: LiveRequest) -> None:
        self._dirty.pop(request, None)

    def displace(self) -> None:
        """Wake the present stream so that it sees its successor."""
        self._event.set()

    async def batches(self, stream: object, *, until: asyncio.Task[None]) -> AsyncIterator[TokenBatch]:
        """Messages for one connection, until another takes its place or `until` is done."""
        while self.stream is stream and not until.done():
            await self._event.wait()
            if self.stream is not stream or until.done():
                return
            self._event.clear()
            self._paced_until_s = time.monotonic() + PACE_S
            batch = self._batch()
            if self._dirty or self._unknown:
                self._event.set()  # more than one message holds
            if batch.lanes or batch.updates or batch.unknown:
                yield batch

    def _batch(self) -> TokenBatch:
        """The next message; who has more to say than fits goes on behind the others."""
        updates: list[SequenceUpdate] = []
        columns = Columns()
        size_bytes = 0
        dirty, self._dirty = self._dirty, {}
        left: dict[LiveRequest, None] = {}
        for request in dirty:
            rows_bytes = ROW_BYTES * len(columns.lanes)
            if len(updates) >= MAX_UPDATES or size_bytes + rows_bytes >= MAX_BATCH_BYTES:
                self._dirty[request] = None
            elif not request.put_plain(columns):
                news = request.news()
                updates.extend(news)
                size_bytes += sum(update.ByteSize() for update in news)
                if request.has_news:
                    left[request] = None
        self._dirty.update(left)
        count = min(len(self._unknown), MAX_UPDATES)
        unknown = [self._unknown.popitem(last=False)[0] for _ in range(count)]
        return TokenBatch(
            updates=updates,
            worker_id=self._worker_id,
            unknown=unknown,
            lanes=columns.lanes,
            indices=columns.indices,
            token_ids=columns.token_ids,
        )
