"""What a replica knows of workers: registry, assigned load and resident prefixes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.bus.waiting_work import requests_by_tenant
from trireme.policies.prefix_index import PrefixIndex, split_hashes
from trireme.policies.routing import WorkerView
from trireme.policies.tenant_places import may_take, used_of_late
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord, Residency, VariantStatus

log = logging.getLogger(__name__)

REFRESH_S = 0.1


class FleetView:
    """Kept fresh by two tasks; between refreshes this replica's own assignments are added."""

    def __init__(self, redis: Redis, keys: Keys, *, queue_limit: int) -> None:
        self._redis = redis
        self._keys = keys
        self._registry = Registry(redis, keys)
        self._residency = Stream(redis, keys.residency, Residency)
        self._queue_limit = queue_limit
        self._prefixes = PrefixIndex()
        self._workers: dict[str, ProcessRecord] = {}
        self._requests: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._in_flight: dict[str, dict[str, int]] = {}
        """Requests assigned and not ended at workers of a model or variant, by its name and tenant."""
        self._used: dict[str, dict[str, float]] = {}
        """The same on average over the last seconds."""
        self._refreshed_s = time.monotonic()
        self.refreshed = asyncio.Event()
        """Set whenever something may have changed."""

    @property
    def worker_ids(self) -> frozenset[str]:
        """Living workers, draining ones too."""
        return frozenset(self._workers)

    def workers_on(self, node: str) -> list[str]:
        """Living workers of a node."""
        return [record.id for record in self._workers.values() if record.node == node]

    def kv_namespace(self, model: str) -> str:
        """Namespace of the KV blocks of a model or variant; empty where no worker serves it now."""
        for record in self._workers.values():
            for status in record.worker.variants:
                if status.ready and status.kv_namespace and model in (status.variant, status.model):
                    return status.kv_namespace
        return ""

    async def refresh(self) -> None:
        """Read the registry and the workers' loads once."""
        records = await self._registry.living("worker")
        async with self._redis.pipeline(transaction=False) as pipe:
            for record in records:
                pipe.hgetall(self._keys.load(record.id))
            rows = cast(list[dict[bytes, bytes]], await pipe.execute())
        self._workers = {record.id: record for record in records}
        self._requests = {r.id: int(row.get(b"requests", 0)) for r, row in zip(records, rows, strict=True)}
        self._tokens = {r.id: int(row.get(b"tokens", 0)) for r, row in zip(records, rows, strict=True)}
        self._note_tenants(dict(zip(self._workers, rows, strict=True)))
        self._prefixes.keep_only(self._workers)
        self.refreshed.set()

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            try:
                await self.refresh()
            except AWAY:
                pass
            await asyncio.sleep(REFRESH_S)

    async def follow_residency(self) -> None:
        """Learn which prefixes workers hold, for ever, from the stream's beginning."""
        async for entry in self._residency.tail(after="0-0"):
            fact = entry.fact
            holder = (fact.worker_id, fact.variant)
            if fact.reset:
                self._prefixes.reset(holder)
            self._prefixes.add(holder, split_hashes(fact.added))
            self._prefixes.remove(holder, split_hashes(fact.removed))

    def _note_tenants(self, loads: Mapping[str, Mapping[bytes, bytes]]) -> None:
        now_s = time.monotonic()
        passed_s, self._refreshed_s = now_s - self._refreshed_s, now_s
        by_model: dict[str, list[Mapping[bytes, bytes]]] = {}
        for worker_id, load in loads.items():
            for model in self._names_at(worker_id):
                by_model.setdefault(model, []).append(load)
        self._in_flight = {model: requests_by_tenant(rows) for model, rows in by_model.items()}
        self._used = {
            model: used_of_late(self._used.get(model, {}), in_flight, passed_s=passed_s)
            for model, in_flight in self._in_flight.items()
        }

    def _names_at(self, worker_id: str) -> set[str]:
        """The models and variants that may be asked for there."""
        record = self._workers.get(worker_id)
        if record is None:
            return set()
        return {name for status in record.worker.variants for name in (status.model, status.variant)}

    def _count(self, worker_id: str, tenant: str, change: int) -> None:
        for model in self._names_at(worker_id):
            held = self._in_flight.setdefault(model, {})
            held[tenant] = max(0, held.get(tenant, 0) + change)

    def may_take(
        self,
        tenant: str,
        model: str,
        views: Sequence[WorkerView],
        *,
        backlogged: bool,
        weights: Mapping[str, float],
    ) -> bool:
        """Whether the tenant may have one of the places for `model`, or it is kept for others."""
        return may_take(
            tenant,
            used=self._used.get(model, {}),
            backlogged=backlogged,
            slots=sum(view.max_sequences for view in views),
            running_free=sum(max(0, view.max_sequences - view.assigned_requests) for view in views),
            queueing_free=sum(
                max(0, min(view.queue_limit, view.max_sequences + view.queue_limit - view.assigned_requests))
                for view in views
            ),
            weights=weights,
        )

    def note_assigned(
        self, worker_id: str, variant: str, *, tenant: str, tokens: int, hashes: Sequence[bytes]
    ) -> None:
        """Count an assignment of this replica before the next refresh shows it."""
        self._count(worker_id, tenant, 1)
        self._requests[worker_id] = self._requests.get(worker_id, 0) + 1
        self._tokens[worker_id] = self._tokens.get(worker_id, 0) + tokens
        self._prefixes.expect((worker_id, variant), hashes)

    def note_withdrawn(self, worker_id: str, *, tenant: str, tokens: int) -> None:
        """An assignment that was counted had no effect."""
        self._count(worker_id, tenant, -1)
        self._requests[worker_id] = max(0, self._requests.get(worker_id, 0) - 1)
        self._tokens[worker_id] = max(0, self._tokens.get(worker_id, 0) - tokens)

    def note_ended(self, worker_id: str, *, tenant: str) -> None:
        """A request ended there: its place is free before the next refresh shows it."""
        if worker_id in self._requests:
            self._requests[worker_id] = max(0, self._requests[worker_id] - 1)
            self._count(worker_id, tenant, -1)

    def views(self, model: str, hashes: Sequence[bytes]) -> list[WorkerView]:
        """Every place where the model (or variant) `model` can be answered now."""
        return [
            self._view(record, status, hashes)
            for record in self._workers.values()
            if record.healthy and not record.worker.draining
            for status in record.worker.variants
            if status.ready and model in (status.variant, status.model)
        ]

    def _view(self, record: ProcessRecord, status: VariantStatus, hashes: Sequence[bytes]) -> WorkerView:
        blocks = self._prefixes.leading_blocks((record.id, status.variant), hashes)
        return WorkerView(
            worker_id=record.id,
            variant=status.variant,
            assigned_requests=self._requests.get(record.id, 0),
            assigned_tokens=self._tokens.get(record.id, 0),
            running=status.running,
            max_sequences=status.max_sequences,
            queue_limit=status.queue_limit or self._queue_limit,
            preemptive=status.preemptive,
            prefill_tokens_per_s=status.prefill_tokens_per_s,
            decode_tokens_per_s=status.decode_tokens_per_s,
            cached_tokens=blocks * status.block_tokens,
        )
