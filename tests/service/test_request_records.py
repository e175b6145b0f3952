"""The life of a request in Redis: every step happens once, and the past has no say."""

from __future__ import annotations

import asyncio

import pytest

from trireme.bus.connection import Keys, open_redis
from trireme.bus.request_records import (
    SCHEDULERS,
    WORKERS,
    Admission,
    Handover,
    RequestRecords,
    Requeue,
    State,
    TenantBounds,
)
from trireme.bus.streams import Entry, Stream
from trireme.bus.waiting_work import WaitingKey, WaitingWork, read_waiting, work_tokens
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, Decision
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters

KEYS = Keys("test")


def admitted(name: str = "r1", *, attempt: int = 1) -> AdmittedRequest:
    sampling = SamplingParameters(max_tokens=7, n=2)
    return AdmittedRequest(
        request_id=name, tenant="t", model="m", prompt_token_ids=[1, 2, 3], sampling=sampling, attempt=attempt
    )


class Bench:
    """One fleet's bus, for tests."""

    def __init__(self, redis: object) -> None:
        self.redis = redis
        self.records = RequestRecords(redis, KEYS)  # type: ignore[arg-type]
        self.requests = Stream(redis, KEYS.requests, AdmittedRequest)  # type: ignore[arg-type]

    def assignments(self, worker: str) -> Stream[Assignment]:
        return Stream(self.redis, KEYS.assignments(worker), Assignment)  # type: ignore[arg-type]

    async def admit(self, name: str = "r1") -> Entry[AdmittedRequest]:
        await self.requests.create_group(SCHEDULERS)
        result = await self.records.admit(admitted(name), max_waiting=10)
        assert result.admission is Admission.ADMITTED
        [entry] = await self.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
        return entry

    async def assign(self, entry: Entry[AdmittedRequest], worker: str = "w1") -> bool:
        assignment = Assignment(request=entry.fact, variant="v", worker_id=worker)
        handover = Handover(entry.entry_id, assignment, Decision(worker_id=worker), work_tokens(entry.fact))
        [assigned] = await self.records.assign([handover])
        return assigned

    async def taken(self, worker: str = "w1") -> Entry[Assignment]:
        stream = self.assignments(worker)
        await stream.create_group(WORKERS)
        [entry] = await stream.read_group(WORKERS, worker, count=10, block_ms=10)
        return entry


@pytest.fixture
async def bench(redis_url: str):  # type: ignore[no-untyped-def]
    async with open_redis(redis_url) as redis:
        yield Bench(redis)


async def test_a_request_is_admitted_once(bench: Bench) -> None:
    await bench.admit()
    again = await bench.records.admit(admitted(), max_waiting=10)
    assert again.admission is Admission.KNOWN
    assert again.state is State.QUEUED
    assert await bench.redis.xlen(KEYS.requests) == 1  # type: ignore[attr-defined]


async def test_a_full_queue_says_no(bench: Bench) -> None:
    for number in range(3):
        result = await bench.records.admit(admitted(f"r{number}"), max_waiting=2)
    assert result.admission is Admission.FULL
    assert result.waiting == 2
    assert await bench.records.standing("r2") is None


async def test_an_assignment_leaves_the_queue_and_counts_as_load(bench: Bench) -> None:
    entry = await bench.admit()
    assert await bench.assign(entry)
    load = await bench.redis.hgetall(KEYS.load("w1"))  # type: ignore[attr-defined]
    assert load == {
        b"requests": b"1",
        b"tokens": b"17",
        b"n|t": b"1",
    }  # 3 prompt tokens and twice 7 answer tokens
    assert await bench.redis.xlen(KEYS.requests) == 0  # type: ignore[attr-defined]
    assert await bench.requests.unread(SCHEDULERS) == 0
    taken = await bench.taken()
    assert await bench.records.end(taken.entry_id, taken.fact, State.FINISHED, tokens=17)
    load = await bench.redis.hgetall(KEYS.load("w1"))  # type: ignore[attr-defined]
    assert load == {b"requests": b"0", b"tokens": b"0"}
    standing = await bench.records.standing("r1")
    assert standing is not None and standing.state is State.FINISHED


async def test_two_replicas_assign_a_request_once(bench: Bench) -> None:
    entry = await bench.admit()
    assert await bench.assign(entry, "w1")
    assert not await bench.assign(entry, "w2")
    assert len(await bench.assignments("w1").everything()) == 1
    assert len(await bench.assignments("w2").everything()) == 0


async def test_only_one_of_gateway_and_reaper_requeues(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry)
    first = await bench.records.requeue(entry.fact, crashed=True)
    second = await bench.records.requeue(entry.fact, crashed=True)
    assert (first, second) == (Requeue.REQUEUED, Requeue.STALE)
    [again] = await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
    assert (again.fact.attempt, again.fact.crashes) == (2, 1)


async def test_the_second_crash_quarantines(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry)
    await bench.records.requeue(entry.fact, crashed=True)
    [again] = await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
    await bench.assign(again, "w2")
    assert await bench.records.requeue(again.fact, crashed=True) is Requeue.QUARANTINED
    standing = await bench.records.standing("r1")
    assert standing is not None and standing.state is State.QUARANTINED
    assert await bench.redis.xlen(KEYS.requests) == 0  # type: ignore[attr-defined]


async def test_a_drained_worker_costs_no_crash(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry)
    for attempt in range(1, 5):
        assert await bench.records.requeue(entry.fact, crashed=False) is Requeue.REQUEUED
        [entry] = await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
        assert entry.fact.attempt == attempt + 1
        await bench.assign(entry)


async def test_the_end_of_an_old_attempt_does_not_end_the_new_one(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry)
    old = await bench.taken()
    await bench.records.requeue(entry.fact, crashed=False)
    assert not await bench.records.end(old.entry_id, old.fact, State.FINISHED, tokens=17)
    standing = await bench.records.standing("r1")
    assert standing is not None and (standing.state, standing.attempt) == (State.QUEUED, 2)


async def test_a_cancelled_request_is_not_assigned(bench: Bench) -> None:
    entry = await bench.admit()
    assert await bench.records.settle("r1", State.CANCELLED) == (True, "")
    assert await bench.records.settle("r1", State.CANCELLED) == (False, "")
    assert not await bench.assign(entry)
    assert await bench.redis.xlen(KEYS.requests) == 0  # type: ignore[attr-defined]


async def test_what_a_dead_replica_held_is_taken_over(bench: Bench) -> None:
    await bench.admit("r1")
    taken = await bench.requests.take_from(SCHEDULERS, "s2", dead_consumer="s1")
    assert [entry.fact.request_id for entry in taken] == ["r1"]
    assert await bench.requests.take_from(SCHEDULERS, "s2", dead_consumer="s1") == []
    assert await bench.assign(taken[0])


async def test_decisions_are_kept_in_order(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry, "w1")
    await bench.records.requeue(entry.fact, crashed=False)
    [entry] = await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
    await bench.assign(entry, "w2")
    assert [d.worker_id for d in await bench.records.decisions("r1")] == ["w1", "w2"]


async def test_tailing_gives_facts_appended_after_the_start(bench: Bench) -> None:
    await bench.requests.publish(admitted("before"))
    start = await bench.requests.last_id()
    await bench.requests.publish(admitted("after"))
    async for entry in bench.requests.tail(after=start):
        assert entry.fact.request_id == "after"
        break


async def test_assigning_survives_a_server_that_forgot_its_scripts(bench: Bench) -> None:
    first = await bench.admit("r1")
    assert await bench.assign(first)
    await bench.redis.script_flush()  # type: ignore[attr-defined]
    second = await bench.admit("r2")
    assert await bench.assign(second)


async def test_letting_go_takes_the_load_off_and_leaves_the_record(bench: Bench) -> None:
    entry = await bench.admit()
    await bench.assign(entry)
    taken = await bench.taken()
    for _ in range(2):  # once more does no harm
        await bench.records.let_go(taken.entry_id, taken.fact, tokens=17)
    load = await bench.redis.hgetall(KEYS.load("w1"))  # type: ignore[attr-defined]
    assert load == {b"requests": b"0", b"tokens": b"0"}
    assert await bench.redis.xlen(KEYS.assignments("w1")) == 0  # type: ignore[attr-defined]
    standing = await bench.records.standing("r1")
    assert standing is not None and (standing.state, standing.attempt) == (State.ASSIGNED, 1)


async def test_an_ended_record_expires_soon_however_it_ended(bench: Bench) -> None:
    entry = await bench.admit("q")
    await bench.assign(entry)
    await bench.records.requeue(entry.fact, crashed=True)
    [again] = await bench.requests.read_group(SCHEDULERS, "s1", count=10, block_ms=10)
    await bench.assign(again, "w2")
    await bench.records.requeue(again.fact, crashed=True)
    await bench.admit("c")
    await bench.records.settle("c", State.CANCELLED)
    for name in ("q", "c"):
        assert 0 < await bench.redis.ttl(KEYS.request(name)) <= 120  # type: ignore[attr-defined]
        assert await bench.records.body(name) is None


async def counts(bench: Bench) -> WaitingWork:
    return await read_waiting(bench.redis, KEYS, ["w1"])  # type: ignore[arg-type]


async def test_what_waits_is_counted_from_admission_to_assignment(bench: Bench) -> None:
    entry = await bench.admit()
    key = WaitingKey("m", 1, "t")
    work = await counts(bench)
    assert (work.entries, work.tenant_requests, work.requests, work.tokens) == (
        1,
        {"t": 1},
        {key: 1},
        {key: 17},
    )
    assert work.served_requests == {} and work.assigned_requests == {"w1": 0}
    await bench.assign(entry)
    work = await counts(bench)
    assert (work.entries, work.tenant_requests, work.requests, work.tokens) == (0, {}, {}, {})
    assert (work.served_requests, work.served_tokens, work.assigned_requests) == (
        {"m": 1},
        {"m": 17},
        {"w1": 1},
    )
    await bench.records.requeue(entry.fact, crashed=False)
    assert (await counts(bench)).tokens == {key: 17}


async def test_what_leaves_the_queue_unserved_is_not_counted_as_served(bench: Bench) -> None:
    cancelled = await bench.admit("c")
    await bench.records.settle("c", State.CANCELLED)
    assert not await bench.assign(cancelled)
    expired = await bench.admit("e")
    for _ in range(2):  # once more does no harm
        await bench.records.withdraw(expired.entry_id, expired.fact)
    work = await counts(bench)
    assert (work.entries, work.requests, work.served_requests) == (0, {}, {})
    assert await bench.redis.exists(KEYS.waiting) == 0  # type: ignore[attr-defined]


async def test_counts_that_an_empty_queue_left_behind_are_forgotten(bench: Bench) -> None:
    await bench.redis.hset(KEYS.waiting, mapping={"n|t": 99, "r|m|1|t": 99, "t|m|1|t": 9999})  # type: ignore[attr-defined]
    assert (await counts(bench)).tenant_requests == {}
    bounds = TenantBounds(shared_from=0, requests=50, backlog_tokens=100)
    result = await bench.records.admit(admitted(), max_waiting=10, bounds=bounds)
    assert result.admission is Admission.ADMITTED
    assert (await counts(bench)).tenant_requests == {"t": 1}


async def test_a_tenants_bounds_hold_at_the_moment_of_joining(bench: Bench) -> None:
    for number in range(3):
        await bench.records.admit(admitted(f"r{number}"), max_waiting=10)
    share = TenantBounds(shared_from=3, requests=3)
    refused = await bench.records.admit(admitted("more"), max_waiting=10, bounds=share)
    assert (refused.admission, refused.waiting) == (Admission.OVER_SHARE, 3)
    late = TenantBounds(backlog_tokens=3 * 17 - 1)
    refused = await bench.records.admit(admitted("more"), max_waiting=10, bounds=late)
    assert refused.admission is Admission.TOO_LATE
    assert await bench.records.standing("more") is None
    other = admitted("other")
    other.tenant = "u|with|bars"
    for bounds in (share, late):
        result = await bench.records.admit(other, max_waiting=10, bounds=bounds)
    assert result.admission is Admission.KNOWN  # it was admitted under the first ones
    assert (await counts(bench)).tenant_requests == {"t": 3, "u|with|bars": 1}
    again = await bench.records.admit(admitted("r0"), max_waiting=10, bounds=share)
    assert again.admission is Admission.KNOWN


async def test_gateways_that_admit_at_once_keep_the_bounds_together(bench: Bench) -> None:
    bounds = TenantBounds(backlog_tokens=5 * 17 - 1)
    results = await asyncio.gather(
        *(bench.records.admit(admitted(f"r{n}"), max_waiting=100, bounds=bounds) for n in range(40))
    )
    taken = [result for result in results if result.admission is Admission.ADMITTED]
    assert len(taken) == 5
    assert {r.admission for r in results} == {Admission.ADMITTED, Admission.TOO_LATE}
