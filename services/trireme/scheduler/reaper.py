"""Takes over what the dead held: assignments of lost workers, entries of lost replicas.

Gateways requeue their own live requests first, since they know what was delivered; the
reaper comes after a grace and takes what nobody else did. The attempt number decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from trireme.bus.connection import AWAY, Keys
from trireme.bus.registry import Registry
from trireme.bus.request_records import SCHEDULERS, WORKERS, RequestRecords, Requeue
from trireme.bus.streams import Stream
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.metrics import Metrics
from trireme.wire.bus.v1.facts_pb2 import (
    AdmittedRequest,
    Assignment,
    Event,
    RequestFailed,
    WorkerLost,
)

log = logging.getLogger(__name__)

PERIOD_S = 0.5
GRACE_S = 1.5
"""A worker stays gone for so long before its requests are taken from it."""


class Reaper:
    """One per replica; a lock in Redis lets one work at a time."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        scheduler_id: str,
        requests: Stream[AdmittedRequest],
        events: Stream[Event],
        records: RequestRecords,
        dispatcher: Dispatcher,
        metrics: Metrics,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._scheduler_id = scheduler_id
        self._registry = Registry(redis, keys)
        self._requests = requests
        self._events = events
        self._records = records
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._gone_since: dict[str, float] = {}

    async def run(self) -> None:
        """Look for the dead, for ever."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                if await self._redis.set(
                    self._keys.lock("reaper"), self._scheduler_id, nx=True, px=int(PERIOD_S * 900)
                ):
                    await self._take_from_workers()
                await self._take_from_replicas()
            except AWAY:
                continue

    async def _take_from_workers(self) -> None:
        members = cast(set[bytes], await self._redis.smembers(self._keys.assigned_workers))
        known = {name.decode() for name in members}
        living = {record.id for record in await self._registry.living("worker")}
        now_s = time.monotonic()
        gone = known - living
        self._gone_since = {name: self._gone_since.get(name, now_s) for name in gone}
        for worker_id, since_s in self._gone_since.items():
            if now_s - since_s >= GRACE_S:
                await self._bury(worker_id)

    async def _bury(self, worker_id: str) -> None:
        assignments = Stream(self._redis, self._keys.assignments(worker_id), Assignment)
        entries = await assignments.everything()
        started = await self._started(assignments.key)
        outcomes = dict.fromkeys(Requeue, 0)
        for entry in entries:
            request = AdmittedRequest()
            request.CopyFrom(entry.fact.request)
            request.avoid_worker_ids.append(worker_id)
            outcome = await self._records.requeue(request, crashed=entry.entry_id in started)
            outcomes[outcome] += 1
            if outcome is Requeue.QUARANTINED:
                await self._publish_quarantined(request)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(assignments.key, self._keys.load(worker_id))
            pipe.srem(self._keys.assigned_workers, worker_id)
            await pipe.execute()
        requeued, quarantined = outcomes[Requeue.REQUEUED], outcomes[Requeue.QUARANTINED]
        self._metrics.workers_lost.inc()
        log.warning(
            "worker_buried",
            extra={"worker_id": worker_id, "reassigned": requeued, "quarantined": quarantined},
        )
        lost = WorkerLost(
            worker_id=worker_id, reason="its lease ended", reassigned=requeued, quarantined=quarantined
        )
        await self._events.publish(Event(id=uuid.uuid4().hex, at_unix_s=time.time(), worker_lost=lost))

    async def _started(self, key: str) -> set[bytes]:
        """Entries that the worker had read, so that its engine may have had them."""
        try:
            rows = await self._redis.xpending_range(key, WORKERS, min="-", max="+", count=10_000)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return set()  # no group: the worker never read anything
        return {cast(bytes, row["message_id"]) for row in rows}

    async def _publish_quarantined(self, request: AdmittedRequest) -> None:
        failed = RequestFailed(
            request_id=request.request_id,
            tenant=request.tenant,
            code="request_quarantined",
            message=f"in an engine at {request.crashes + 1} crashes",
        )
        await self._events.publish(Event(id=uuid.uuid4().hex, at_unix_s=time.time(), failed=failed))

    async def _take_from_replicas(self) -> None:
        living = {record.id for record in await self._registry.living("scheduler")}
        try:
            consumers = await self._redis.xinfo_consumers(self._requests.key, SCHEDULERS)
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            return  # Redis lost its memory; the next read makes the group anew
        for consumer in consumers:
            name = consumer["name"].decode()
            if name in living or name == self._scheduler_id:
                continue
            taken = await self._requests.take_from(SCHEDULERS, self._scheduler_id, dead_consumer=name)
            self._dispatcher.hold(taken)
            if taken:
                log.warning("replica_succeeded", extra={"scheduler_id": name, "requests": len(taken)})
