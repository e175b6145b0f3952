"""The dispatcher and the tenants' counters against a real Redis that fails at awkward moments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisAway

from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.request_records import SCHEDULERS, RequestRecords, State
from trireme.bus.streams import Stream
from trireme.policies import tenant_places
from trireme.runtime.spans import NoSpans
from trireme.scheduler import dispatcher as dispatcher_module
from trireme.scheduler import tenant_shares
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.fleet_view import FleetView
from trireme.scheduler.metrics import Metrics
from trireme.scheduler.tenant_shares import TenantShares
from trireme.wire.bus.v1.facts_pb2 import (
    AdmittedRequest,
    Assignment,
    ProcessRecord,
    VariantStatus,
    WorkerStatus,
)
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters

KEYS = Keys("test")


class Bench:
    """One replica's parts around a real Redis, with a worker that has room for all."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis
        self.records = RequestRecords(redis, KEYS)
        self.requests = Stream(redis, KEYS.requests, AdmittedRequest)
        self.view = FleetView(redis, KEYS, queue_limit=4)
        self.shares = TenantShares(redis, KEYS)
        self.dispatcher = Dispatcher(
            scheduler_id="s1",
            requests=self.requests,
            records=self.records,
            view=self.view,
            shares=self.shares,
            metrics=Metrics(),
            spans=NoSpans(),
            window_requests=100,
        )

    async def prepare(self) -> None:
        await self.requests.create_group(SCHEDULERS)
        status = VariantStatus(variant="v", model="m", ready=True, max_sequences=64)
        record = ProcessRecord(
            id="w1", service="worker", healthy=True, worker=WorkerStatus(variants=[status])
        )
        await Registry(self.redis, KEYS).put(record)
        await self.view.refresh()

    async def admit(self, name: str, *, deadline_unix_s: float = 0.0, tenant: str = "t") -> None:
        request = AdmittedRequest(
            request_id=name,
            tenant=tenant,
            model="m",
            prompt_token_ids=[1] * 10,
            sampling=SamplingParameters(max_tokens=5, n=1),
            attempt=1,
            admitted_unix_s=time.time(),
            deadline_unix_s=deadline_unix_s,
        )
        await self.records.admit(request, max_waiting=100)

    async def state(self, name: str) -> State:
        standing = await self.records.standing(name)
        assert standing is not None
        return standing.state

    async def assigned(self) -> list[str]:
        entries = await Stream(self.redis, KEYS.assignments("w1"), Assignment).everything()
        return sorted(entry.fact.request.request_id for entry in entries)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.dispatcher.read()), asyncio.create_task(self.dispatcher.dispatch())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        await bench.prepare()
        yield bench


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_an_absence_while_one_expires_loses_none_of_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 3
    settle = bench.records.settle

    async def failing(request_id: str, state: State) -> tuple[bool, str]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RedisAway
        return await settle(request_id, state)

    monkeypatch.setattr(bench.records, "settle", failing)
    for number in range(3):
        await bench.admit(f"r{number}")
    await bench.admit("late", deadline_unix_s=time.time() - 1)
    await bench.admit("r3")
    async with bench.running():

        async def all_done() -> bool:
            expired = await bench.state("late") is State.FAILED and not bench.dispatcher._entries
            return expired and len(await bench.assigned()) == 4

        await until(all_done)
    assert await bench.assigned() == ["r0", "r1", "r2", "r3"]
    assert await bench.redis.xlen(KEYS.requests) == 0
    assert not bench.dispatcher.waiting_by_tenant()


async def test_what_no_reply_told_of_is_found_and_assigned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "LOOK_BACK_S", 0.05)
    await bench.admit("lost")
    # The server counts it as read by this replica, which never saw the reply.
    await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
    async with bench.running():

        async def assigned() -> bool:
            return await bench.assigned() == ["lost"]

        await until(assigned)


async def test_a_choice_without_effect_costs_the_tenant_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign, failures = bench.records.assign, 5

    async def failing(handovers: Any) -> list[bool]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RedisAway
        return await assign(handovers)

    monkeypatch.setattr(bench.records, "assign", failing)
    for name in ("cancelled", "served"):
        await bench.admit(name)
    await bench.records.settle("cancelled", State.CANCELLED)
    async with bench.running():

        async def assigned() -> bool:
            return await bench.assigned() == ["served"] and not bench.dispatcher._entries

        await until(assigned)
    assert bench.shares.counters["t"] == 10 + 2 * 5, "one prompt of 10 and one answer of 5, once"
    assert bench.view.views("m", [])[0].assigned_requests == 1


async def test_made_up_tenants_do_not_fill_redis(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_shares, "MAX_TENANTS", 100)
    for number in range(150):
        bench.shares.charge(f"made-up-{number}", 1.0 + number)
    bench.shares.charge("waits", 0.5)
    await bench.shares.synchronise(waiting={"waits"})
    assert await bench.redis.hlen(KEYS.virtual_tokens) == 50
    assert len(bench.shares.counters) == 50
    assert bench.shares.counters["waits"] == 0.5, "who waits keeps its counter"
    assert bench.shares.counters["made-up-149"] == 150.0, "who was served most keeps its counter"
    await bench.shares.synchronise()
    assert len(bench.shares.counters) == 50


async def test_an_entry_held_again_while_it_is_handed_over_is_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign = bench.records.assign

    async def overlapping(handovers: Any) -> list[bool]:
        bench.dispatcher.hold(list(bench.dispatcher._entries.values()))
        return await assign(handovers)

    monkeypatch.setattr(bench.records, "assign", overlapping)
    await bench.admit("r")
    async with bench.running():

        async def assigned() -> bool:
            return await bench.assigned() == ["r"] and not bench.dispatcher._entries

        await until(assigned)
        await asyncio.sleep(0.1)
    assert not bench.dispatcher.waiting_by_tenant()


async def test_a_flood_leaves_a_place_where_another_tenant_is_about(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_places, "MEMORY_S", 1e-6)
    await bench.admit("small0", tenant="small")
    for number in range(60):
        await bench.admit(f"early{number}", tenant="flood")
    async with bench.running():

        async def all_are_assigned() -> bool:
            return len(await bench.assigned()) == 61

        await until(all_are_assigned)
    await bench.view.refresh()
    monkeypatch.setattr(tenant_places, "MEMORY_S", 1e6)  # 60 places were the flood's, and one the other's
    for number in range(90):
        await bench.admit(f"flood{number}", tenant="flood")
    async with bench.running():

        async def flood_has_the_rest() -> bool:
            return len(await bench.assigned()) == 63

        await until(flood_has_the_rest)
        await bench.admit("late", tenant="small")

        async def small_is_served() -> bool:
            return "late" in await bench.assigned()

        await until(small_is_served)
    assert len(await bench.assigned()) == 64
