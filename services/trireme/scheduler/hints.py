"""What will run next, told to the kvstores ahead of time: the scheduler's real queue order.

Each node's store hears of the requests that wait here, in the fair order in which they will be
handed out, and of those that were handed to the node's workers and have hardly begun. A hint names
the whole order, since it changes with every tenant's share, and describes a request's blocks only
now and then. Nothing is told where no store lives.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.policies.routing import Choice
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.fleet_view import FleetView
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Hint, ProcessRecord, WaitingRequest

log = logging.getLogger(__name__)

PERIOD_S = 0.05
MAX_TOLD = 256
"""Requests of one hint; those behind are too far away to fetch for."""
MAX_DESCRIBED_BYTES = 256 * 1024
"""Block hashes of one hint; the rest is described in the next one."""
REPEAT_S = 2.0
"""An order that does not change is told again, so that its source counts as alive."""
DESCRIBE_AGAIN_S = 10.0
FIND_STORES_S = 1.0
BEGUN_S = 2.0
"""An assigned request is told for so long beyond its expected start."""
_MAX_HINTS = 256
_FIRST_GAP_S = 0.05
_LONGEST_GAP_S = 10.0
_GAP_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Upcoming:
    """A request and when it is expected to start, seconds since 1970."""

    request: AdmittedRequest
    namespace: str
    start_unix_s: float
    is_assigned: bool


@dataclass(slots=True)
class _Store:
    """What one node's store has been told."""

    process_id: str
    stream: Stream[Hint]
    order: list[str] = field(default_factory=list)
    told_s: float = 0.0
    described_s: dict[str, float] = field(default_factory=dict)


class AssignedRequests:
    """Requests that this replica handed to workers and that may not have begun."""

    def __init__(self) -> None:
        self._by_worker: dict[str, dict[str, Upcoming]] = {}
        self._gap_s = _FIRST_GAP_S
        self._last_s: float | None = None

    @property
    def rate_per_s(self) -> float:
        """Requests handed out per second, lately."""
        return 1 / self._gap_s

    def note(self, request: AdmittedRequest, choice: Choice, *, namespace: str, now_s: float) -> None:
        """A request was handed to a worker."""
        if self._last_s is not None:
            gap_s = min(_LONGEST_GAP_S, max(1e-3, now_s - self._last_s))
            self._gap_s += _GAP_SMOOTHING * (gap_s - self._gap_s)
        self._last_s = now_s
        queue_s = choice.estimates[0].queue_s if choice.estimates else 0.0
        waiting = Upcoming(request, namespace, now_s + queue_s, True)
        self._by_worker.setdefault(choice.worker_id, {})[request.request_id] = waiting

    def note_end(self, worker_id: str, request_id: str) -> None:
        """A request ended."""
        self._by_worker.get(worker_id, {}).pop(request_id, None)

    def at(self, worker_ids: Iterable[str], *, now_s: float) -> list[Upcoming]:
        """Those at these workers, soonest first; what must have begun by now is forgotten."""
        found: list[Upcoming] = []
        for worker_id in worker_ids:
            waiting = self._by_worker.get(worker_id, {})
            for request_id in [name for name, each in waiting.items() if each.start_unix_s + BEGUN_S < now_s]:
                del waiting[request_id]
            found.extend(waiting.values())
        return sorted(found, key=lambda each: each.start_unix_s)

    def keep_only(self, worker_ids: Iterable[str]) -> None:
        """Forget workers that are gone."""
        living = set(worker_ids)
        self._by_worker = {name: each for name, each in self._by_worker.items() if name in living and each}


class HintPublisher:
    """Tells every node's kvstore what it will need."""

    def __init__(
        self, redis: Redis, keys: Keys, *, scheduler_id: str, dispatcher: Dispatcher, view: FleetView
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._registry = Registry(redis, keys)
        self._scheduler_id = scheduler_id
        self._dispatcher = dispatcher
        self._view = view
        self._stores: dict[str, _Store] = {}
        self.assigned = AssignedRequests()

    def note_assigned(self, request: AdmittedRequest, choice: Choice) -> None:
        """A request was handed to a worker."""
        namespace = self._view.kv_namespace(choice.variant)
        if self._stores and request.prefix_hashes and namespace:
            self.assigned.note(request, choice, namespace=namespace, now_s=time.time())

    async def run(self) -> None:
        """Publish for ever."""
        found_s = 0.0
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                if time.monotonic() - found_s >= FIND_STORES_S:
                    self.know(await self._registry.living("kvstore"))
                    self.assigned.keep_only(self._view.worker_ids)
                    found_s = time.monotonic()
                if self._stores:
                    await self.publish(now_s=time.time())
            except AWAY:
                continue

    def know(self, stores: Sequence[ProcessRecord]) -> None:
        """These stores live now; a new one has heard nothing yet."""
        living = {record.node: record.id for record in stores}
        for node in self._stores.keys() - living.keys():
            del self._stores[node]
        for node, process_id in living.items():
            known = self._stores.get(node)
            if known is None or known.process_id != process_id:
                stream = Stream(self._redis, self._keys.hints(node), Hint, max_entries=_MAX_HINTS)
                self._stores[node] = _Store(process_id, stream)

    async def publish(self, *, now_s: float) -> None:
        """Tell each store its order, where that changed or was told long ago."""
        waiting = self._waiting(now_s)
        async with self._redis.pipeline(transaction=False) as pipe:
            for node, store in self._stores.items():
                assigned = self.assigned.at(self._view.workers_on(node), now_s=now_s)
                order = heapq.merge(assigned, waiting, key=lambda each: each.start_unix_s)
                hint = self._hint(store, list(order)[:MAX_TOLD], now_s=now_s)
                if hint is not None:
                    await store.stream.publish(hint, via=pipe)
            if len(pipe):
                await pipe.execute()

    def _waiting(self, now_s: float) -> list[Upcoming]:
        rate_per_s = self.assigned.rate_per_s
        waiting = []
        for position, request in enumerate(self._dispatcher.upcoming(MAX_TOLD, now_s=now_s)):
            namespace = self._view.kv_namespace(request.model)
            if request.prefix_hashes and namespace:
                start_unix_s = now_s + (position + 1) / rate_per_s
                waiting.append(Upcoming(request, namespace, start_unix_s, False))
        return waiting

    def _hint(self, store: _Store, order: Sequence[Upcoming], *, now_s: float) -> Hint | None:
        names = [each.request.request_id for each in order]
        told = {name: at_s for name, at_s in store.described_s.items() if now_s - at_s < DESCRIBE_AGAIN_S}
        described: list[WaitingRequest] = []
        size_bytes = 0
        for each in order:
            name = each.request.request_id
            # What was described while it waited is described again, once, when its node is known.
            mark = f"{name}/assigned" if each.is_assigned else name
            if mark in told or size_bytes > MAX_DESCRIBED_BYTES:
                continue
            described.append(_describe(each))
            size_bytes += len(each.request.prefix_hashes)
            told[mark] = now_s
        store.described_s = told
        is_stale = bool(names) and now_s - store.told_s >= REPEAT_S
        if names == store.order and not described and not is_stale:
            return None
        store.order, store.told_s = names, now_s
        return Hint(
            id=uuid.uuid4().hex,
            source=self._scheduler_id,
            made_unix_s=now_s,
            request_ids=names,
            start_in_s=[max(0.0, each.start_unix_s - now_s) for each in order],
            described=described,
        )


def _describe(upcoming: Upcoming) -> WaitingRequest:
    request = upcoming.request
    return WaitingRequest(
        request_id=request.request_id,
        tenant=request.tenant,
        session_id=request.session_id,
        namespace=upcoming.namespace,
        block_hashes=request.prefix_hashes,
        runs_here=upcoming.is_assigned,
    )
