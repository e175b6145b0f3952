"""What becomes of live requests when a worker, a fact or Redis' memory is lost.

The request's record on the bus decides: each step is fenced by its attempt number, so that
this gateway, another one and the scheduler's reaper may all try the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from trireme.bus.connection import AWAY, Keys
from trireme.bus.request_records import (
    WORKERS,
    Admission,
    RequestRecords,
    Requeue,
    Standing,
    State,
)
from trireme.bus.streams import Stream
from trireme.errors import (
    DeadlineExceeded,
    RequestCancelled,
    RequestFailed,
    RequestNotFound,
    RequestQuarantined,
    TriremeError,
)
from trireme.gateway.live_request import LiveRequest
from trireme.gateway.metrics import Metrics
from trireme.gateway.request_table import RequestTable
from trireme.gateway.worker_links import WorkerLinks
from trireme.wire.bus.v1.facts_pb2 import Assignment

log = logging.getLogger(__name__)

SWEEP_S = 0.25
CHECKS_AT_ONCE = 32
UNKNOWN_PATIENCE_S = 10.0
"""A worker that was assigned a request may take so long to read it from the bus."""


class Recovery:
    """Watches the live requests of one gateway."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        records: RequestRecords,
        links: WorkerLinks,
        metrics: Metrics,
        gateway_id: str,
        silence_s: float,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._records = records
        self._links = links
        self._metrics = metrics
        self._gateway_id = gateway_id
        self._silence_s = silence_s
        self._table: RequestTable | None = None
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, table: RequestTable) -> None:
        """Name the table; before `run`."""
        self._table = table

    async def run(self) -> None:
        """Check the silent requests, for ever."""
        assert self._table is not None, "watch() comes before run()"
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s, now_unix_s = time.monotonic(), time.time()
            for live in self._table:
                if live.ended:
                    continue
                deadline_s = live.admitted.deadline_unix_s
                if deadline_s and now_unix_s > deadline_s:
                    live.fail(DeadlineExceeded("the request's deadline passed before its answer's end"))
                    continue
                if now_s - live.last_news_s >= self._silence_s and now_s >= live.next_check_s:
                    self.check_soon(live)

    def check_soon(self, live: LiveRequest) -> None:
        """Compare a request with its record, in the background, once at a time."""
        if live.request_id in self._busy or len(self._busy) >= CHECKS_AT_ONCE:
            return
        self._background(live, self._check(live))

    def worker_lost(self, worker_id: str, in_order: bool) -> None:
        """Queue again what this worker served; look after what it may have been assigned."""
        assert self._table is not None, "watch() comes before run()"
        served = [live for live in self._table if live.worker_id == worker_id and not live.ended]
        for live in served:
            self._pause(live, worker_id)
            crashed = live.admitted_at == worker_id and not in_order
            self._background(live, self._serve_elsewhere(live, worker_id, crashed=crashed))
        for live in self._table:
            if not live.worker_id:
                live.next_check_s = 0.0
                self.check_soon(live)
        log.warning(
            "worker_lost", extra={"worker_id": worker_id, "in_order": in_order, "requests": len(served)}
        )

    def unknown(self, live: LiveRequest, worker_id: str) -> None:
        """A worker does not know what its record says it has, or has not read it yet."""
        if not live.ended and live.unknown_since_s is None:
            live.unknown_since_s = time.monotonic()
            self.check_soon(live)

    def _background(self, live: LiveRequest, work: object) -> None:
        self._busy.add(live.request_id)
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._busy.discard(live.request_id)
            if not task.cancelled() and task.exception() is not None:
                log.error("recovery_failed", exc_info=task.exception(), extra={"request_id": live.request_id})

        task.add_done_callback(done)

    async def _serve_elsewhere(self, live: LiveRequest, worker_id: str, *, crashed: bool) -> None:
        try:
            if not await self._requeue(live, worker_id, crashed=crashed):
                await self._check(live)
        except AWAY:
            live.next_check_s = 0.0  # The sweep tries again when Redis is back.

    async def _requeue(self, live: LiveRequest, worker_id: str, *, crashed: bool) -> bool:
        """Queue the request as its next attempt; False where its record had moved on."""
        again = live.again(gateway_id=self._gateway_id, avoid_worker_id=worker_id)
        outcome = await self._records.requeue(again, crashed=crashed)
        crashes = again.crashes + int(crashed)
        if outcome is Requeue.REQUEUED:
            again.crashes = crashes
            live.admitted = again
            live.enter_attempt(again.attempt + 1, time.monotonic())
            self._metrics.requeued.inc()
        elif outcome is Requeue.QUARANTINED:
            live.fail(_quarantined(crashes))
        return outcome is not Requeue.STALE

    async def _check(self, live: LiveRequest) -> None:
        now_s = time.monotonic()
        live.next_check_s = now_s + max(self._silence_s, min(5.0, (now_s - live.last_news_s) / 2))
        try:
            standing = await self._records.standing(live.request_id)
            if standing is None:
                await self._admit_again(live)
            elif not standing.state.is_open:
                await self._closed(live, standing)
            else:
                await self._open(live, standing)
        except AWAY as error:
            log.warning("check_without_redis", extra={"request_id": live.request_id, "error": str(error)})

    async def _admit_again(self, live: LiveRequest) -> None:
        again = live.again(gateway_id=self._gateway_id)
        again.attempt = 1
        result = await self._records.admit(again, max_waiting=2**31)
        log.warning("record_was_lost", extra={"request_id": live.request_id})
        if result.admission is Admission.ADMITTED:
            live.admitted = again
            live.enter_attempt(1, time.monotonic())

    async def _closed(self, live: LiveRequest, standing: Standing) -> None:
        if live.ended:
            return
        if standing.state is State.FINISHED:
            # Its output may still be kept where it was made.
            if live.unknown_since_s is not None or not self._links.is_connected(standing.worker_id):
                live.fail(RequestNotFound("the request ended and its output is no longer kept"))
            else:
                self._adopt(live, standing)
                self._links.attach(standing.worker_id, live.request_id)
            return
        live.fail(ending_error(standing))

    async def _open(self, live: LiveRequest, standing: Standing) -> None:
        if standing.attempt != live.attempt:
            self._adopt(live, standing)
        if standing.state is State.QUEUED:
            return
        worker_id = standing.worker_id
        if self._links.is_connected(worker_id):
            since_s = live.unknown_since_s
            if since_s is None or time.monotonic() - since_s < UNKNOWN_PATIENCE_S:
                self._links.attach(worker_id, live.request_id)
                return
            crashed = False
        else:
            await self._links.scan()
            if self._links.is_registered(worker_id):
                return  # It lives; its stream comes back or its lease ends.
            crashed = await self._had_started(live, worker_id)
        if live.attempt == standing.attempt and not live.ended:
            self._pause(live, worker_id)
            await self._requeue(live, worker_id, crashed=crashed)

    def _pause(self, live: LiveRequest, worker_id: str) -> None:
        live.pause(f"worker {worker_id} was lost; another one goes on", time.monotonic())
        self._metrics.pauses.inc()

    def _adopt(self, live: LiveRequest, standing: Standing) -> None:
        live.enter_attempt(standing.attempt, time.monotonic())
        live.admitted.crashes = standing.crashes

    async def _had_started(self, live: LiveRequest, worker_id: str) -> bool:
        """Whether a lost worker had read this attempt's assignment, so that its engine may have had it.

        An earlier attempt may lie there too: its crash is counted already.
        """
        key = self._keys.assignments(worker_id)
        entries = await Stream(self._redis, key, Assignment).everything()
        mine = {
            entry.entry_id
            for entry in entries
            if entry.fact.request.request_id == live.request_id and entry.fact.request.attempt == live.attempt
        }
        if not mine:
            return False
        try:
            rows = await self._redis.xpending_range(key, WORKERS, min="-", max="+", count=10_000)
        except ResponseError:
            return False  # No group: it never read anything.
        return any(cast(bytes, row["message_id"]) in mine for row in rows)


def ending_error(standing: Standing) -> TriremeError:
    """Why a request that ended without an answer did so."""
    if standing.state is State.QUARANTINED:
        return _quarantined(standing.crashes)
    if standing.state is State.CANCELLED:
        return RequestCancelled("the request was cancelled")
    return RequestFailed("the engine failed on this request")


def _quarantined(crashes: int) -> RequestQuarantined:
    return RequestQuarantined(
        f"{crashes} workers crashed with this request in their engine; it is not tried again"
    )
