"""Hints: the scheduler's real order reaches the stores of the nodes it concerns, bounded and in parts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from redis.asyncio import Redis

from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.request_records import RequestRecords
from trireme.bus.streams import Entry, Stream
from trireme.policies.routing import Choice, Estimate
from trireme.runtime.spans import NoSpans
from trireme.scheduler import hints as hints_module
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.fleet_view import FleetView
from trireme.scheduler.hints import HintPublisher
from trireme.scheduler.metrics import Metrics
from trireme.scheduler.tenant_shares import TenantShares
from trireme.wire.bus.v1.facts_pb2 import (
    AdmittedRequest,
    Hint,
    ProcessRecord,
    VariantStatus,
    WorkerStatus,
)
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters, SloClass

KEYS = Keys("test")


class Bench:
    """One replica's parts around a real Redis: two nodes with a worker each, and what is said of stores."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.view = FleetView(redis, KEYS, queue_limit=4)
        self.shares = TenantShares(redis, KEYS)
        self.dispatcher = Dispatcher(
            scheduler_id="s1",
            requests=Stream(redis, KEYS.requests, AdmittedRequest),
            records=RequestRecords(redis, KEYS),
            view=self.view,
            shares=self.shares,
            metrics=Metrics(),
            spans=NoSpans(),
            window_requests=1000,
        )
        self.hints = HintPublisher(redis, KEYS, scheduler_id="s1", dispatcher=self.dispatcher, view=self.view)
        self.start_s = time.time()

    async def prepare(self) -> None:
        for node in ("n1", "n2"):
            status = VariantStatus(variant="v", model="m", ready=True, max_sequences=4, kv_namespace="space")
            worker = WorkerStatus(variants=[status])
            record = ProcessRecord(id=f"w-{node}", service="worker", node=node, healthy=True, worker=worker)
            await Registry(self.redis, KEYS).put(record)
        await self.view.refresh()

    def stores(self, *names: str) -> None:
        self.hints.know([ProcessRecord(id=name, node=name[:2], service="kvstore") for name in names])

    def hold(
        self,
        name: str,
        *,
        tenant: str = "t",
        slo: SloClass.ValueType = SloClass.SLO_CLASS_UNSPECIFIED,
        hashes: int = 2,
        weight: float = 0.0,
    ) -> AdmittedRequest:
        request = AdmittedRequest(
            request_id=name,
            tenant=tenant,
            tenant_weight=weight,
            model="m",
            slo_class=slo,
            session_id=f"session-{name}",
            prompt_token_ids=[1] * 32,
            prefix_hashes=name.encode().ljust(16, b".") * hashes,
            sampling=SamplingParameters(max_tokens=8, n=1),
            attempt=1,
            admitted_unix_s=self.start_s + len(self.dispatcher._entries) * 1e-3,
        )
        self.dispatcher.hold([Entry(name.encode(), request)])
        return request

    async def told(self, node: str) -> list[Hint]:
        return [each.fact for each in await Stream(self.redis, KEYS.hints(node), Hint).everything()]

    async def publish(self, after_s: float) -> None:
        await self.hints.publish(now_s=self.start_s + after_s)


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        await bench.prepare()
        yield bench


async def test_the_order_told_is_the_fair_one_and_not_that_of_arrival(bench: Bench) -> None:
    bench.stores("n1-a")
    bench.shares.charge("rich", 1000.0)
    bench.hold("batch", tenant="poor", slo=SloClass.SLO_CLASS_BATCH)
    bench.hold("rich", tenant="rich", slo=SloClass.SLO_CLASS_INTERACTIVE)
    bench.hold("poor", tenant="poor", slo=SloClass.SLO_CLASS_INTERACTIVE)
    bench.hold("short", tenant="poor", slo=SloClass.SLO_CLASS_INTERACTIVE, hashes=0)
    await bench.publish(0.0)
    (hint,) = await bench.told("n1")
    assert list(hint.request_ids) == ["poor", "rich", "batch"], "what needs no block is not told"
    assert list(hint.start_in_s) == sorted(hint.start_in_s) and hint.source == "s1"
    described = hint.described[0]
    assert (described.request_id, described.namespace, described.session_id) == (
        "poor",
        "space",
        "session-poor",
    )
    assert described.block_hashes == b"poor............" * 2 and not described.runs_here


async def test_a_tenant_of_three_times_the_weight_is_served_three_times_as_often(bench: Bench) -> None:
    names = [f"{tenant}-{number}" for number in range(40) for tenant in ("light", "heavy")]
    weights = {"light": 0.0, "heavy": 3.0}  # 0 as a gateway of an older version sends it: 1
    for name in names:
        tenant = name.partition("-")[0]
        bench.hold(name, tenant=tenant, weight=weights[tenant])
    order = [each.tenant for each in bench.dispatcher.upcoming(40, now_s=bench.start_s + 1.0)]
    assert (order.count("heavy"), order.count("light")) == (30, 10)


async def test_only_changes_are_told_and_blocks_only_now_and_then(bench: Bench) -> None:
    bench.stores("n1-a")
    await bench.publish(0.0)
    assert await bench.told("n1") == [], "nothing waits, nothing is told"
    bench.hold("a")
    for after_s in (0.0, 0.05, 0.1):
        await bench.publish(after_s)
    assert len(await bench.told("n1")) == 1
    bench.hold("b")
    await bench.publish(0.15)
    first, second = await bench.told("n1")
    assert [each.request_id for each in first.described] == ["a"]
    assert list(second.request_ids) == ["a", "b"]
    assert [each.request_id for each in second.described] == ["b"]
    await bench.publish(0.15 + hints_module.REPEAT_S)
    assert len(await bench.told("n1")) == 3, "a source shows that it lives"
    # A store that was started anew has heard nothing.
    bench.stores("n1-b")
    await bench.publish(3.0)
    assert [each.request_id for each in (await bench.told("n1"))[-1].described] == ["a", "b"]
    # The queue's end is told too.
    bench.dispatcher._held.discard(b"a")
    bench.dispatcher._held.discard(b"b")
    await bench.publish(3.1)
    assert list((await bench.told("n1"))[-1].request_ids) == []


async def test_what_a_worker_has_is_told_to_its_node_alone_until_it_has_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long this test takes: what is assigned in it is assigned at its start.
    monkeypatch.setattr(hints_module, "time", SimpleNamespace(time=lambda: bench.start_s))
    bench.stores("n1-a", "n2-a")
    bench.hold("waits")
    bench.hold("goes")
    request = bench.dispatcher._entries[b"goes"].fact
    bench.dispatcher._held.discard(b"goes")
    estimate = Estimate(
        worker_id="w-n1", variant="v", queue_s=0.01, prefill_s=0.0, decode_s=0.0, cached_tokens=0
    )
    choice = Choice(
        worker_id="w-n1", variant="v", initial_queue=0, cached_tokens=0, reason="", estimates=(estimate,)
    )
    bench.hints.note_assigned(request, choice)
    await bench.publish(0.0)
    (here,), (there,) = await bench.told("n1"), await bench.told("n2")
    assert list(here.request_ids) == ["goes", "waits"] and list(there.request_ids) == ["waits"]
    assert [each.runs_here for each in here.described] == [True, False]
    bench.hints.assigned.note_end("w-n1", "goes")
    await bench.publish(0.1)
    assert list((await bench.told("n1"))[-1].request_ids) == ["waits"]
    bench.hints.note_assigned(request, choice)
    await bench.publish(60.0)
    assert list((await bench.told("n1"))[-1].request_ids) == ["waits"], "it must have begun long ago"


async def test_a_hint_is_bounded_and_the_rest_is_described_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints_module, "MAX_DESCRIBED_BYTES", 10 * 16)
    bench.stores("n1-a")
    for number in range(300):
        bench.hold(f"r{number:03d}", hashes=2)
    seen: set[str] = set()
    for turn in range(60):
        await bench.publish(0.05 * turn)
    for hint in await bench.told("n1"):
        assert len(hint.request_ids) == hints_module.MAX_TOLD
        assert sum(len(each.block_hashes) for each in hint.described) <= 12 * 16
        seen |= {each.request_id for each in hint.described}
    assert seen == {f"r{number:03d}" for number in range(hints_module.MAX_TOLD)}


async def test_where_no_store_lives_nothing_is_told(bench: Bench) -> None:
    bench.hold("a")
    bench.stores()
    await bench.publish(0.0)
    assert await bench.redis.keys("test:hints:*") == []
