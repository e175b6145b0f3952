"""The life of a request in Redis: every step happens once, and the past has no say."""

from __future__ import annotations

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
)
from trireme.bus.streams import Entry, Stream
from trireme.bus.waiting_work import work_tokens
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
    assert load == {b"requests": b"1", b"tokens": b"17"}  # 3 prompt tokens and twice 7 answer tokens
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
