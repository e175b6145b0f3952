"""The worker's requests in process: overtaken attempts, stops, backlogs, hand-backs."""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisAway

from trireme.bus.request_records import State
from trireme.bus.streams import Entry
from trireme.errors import InvalidRequest
from trireme.runtime.spans import NoSpans
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, Event, RequestKind
from trireme.wire.inference.v1 import inference_pb2 as inference
from trireme.wire.worker.v1.worker_pb2 import TokenBatch
from trireme.worker.billing import Biller
from trireme.worker.engine_messages import Add, Cancel, Gone, Refused, Unload
from trireme.worker.intake import Intake
from trireme.worker.live_requests import LiveRequest
from trireme.worker.outboxes import MAX_BATCH_BYTES
from trireme.worker.request_chains import RequestChains
from trireme.worker.request_table import RequestTable, new_choices
from trireme.worker.sequence_requests import sequences_of
from trireme.worker.step_news import Output, StepNews, Work
from trireme.worker.variants import VariantTable

MESSAGE_LIMIT_BYTES = 16 * 2**20


class Records:
    """Notes what a worker does to the records."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.away = False

    def _note(self, *what: Any) -> None:
        if self.away:
            raise RedisAway
        self.done.append(what)  # type: ignore[arg-type]

    async def end(self, entry_id: bytes, assignment: Assignment, state: State, *, tokens: int) -> bool:
        self._note("end", entry_id)
        return True

    async def let_go(self, entry_id: bytes, assignment: Assignment, *, tokens: int) -> None:
        self._note("let_go", entry_id)

    async def requeue(self, request: AdmittedRequest, *, crashed: bool) -> None:
        assert not crashed
        self._note("requeue", tuple(request.avoid_worker_ids))


class Events:
    def __init__(self) -> None:
        self.published: list[Event] = []

    async def publish(self, event: Event) -> None:
        self.published.append(event)


class Engines:
    """Does at once what it is told, as the engine process does before its next step."""

    def __init__(self) -> None:
        self.handles: dict[str, int] = {}
        """Of all that were ever added."""
        self.sequences: dict[int, str] = {}
        """Of the one variant, by handle: request and choice and attempt."""
        self.is_loaded = True
        self.refuses = False
        self.gone: list[Gone] = []
        self.refused: list[Refused] = []

    def send(self, what: Add | Cancel) -> None:
        match what:
            case Add("v", body, sequences) if self.is_loaded and not self.refuses:
                request = AdmittedRequest.FromString(body)
                for choice, handle in sequences:
                    assert handle not in self.sequences, "each has a handle of its own"
                    self.sequences[handle] = sequence_name(request, choice)
                    self.handles[self.sequences[handle]] = handle
            case Add(_, _, sequences):
                handles = tuple(handle for _, handle in sequences)
                if self.is_loaded:
                    self.refused.append(Refused(handles, "invalid_request", "no"))
                else:
                    self.gone.append(Gone(handles))
            case Cancel(_, handles):
                for handle in handles:
                    self.sequences.pop(handle, None)

    async def ask(self, what: Unload) -> bool:
        assert what == Unload("v")
        if self.sequences:
            return False
        self.is_loaded = False
        return True


class Loads:
    """Expects nothing of the store."""

    def expect(self, live: LiveRequest, loaded: Any, hashes: Any) -> int:
        return 0


class Bench:
    def __init__(self) -> None:
        self.records, self.events, self.engines = Records(), Events(), Engines()

        self.table = RequestTable(
            worker_id="w",
            records=self.records,  # type: ignore[arg-type]
            events=self.events,  # type: ignore[arg-type]
            biller=Biller("cpu", node="local"),
            spans=NoSpans(),
            cancel=lambda variant, handles: self.engines.send(Cancel(variant, handles)),
        )
        self.variants = VariantTable(self.engines)  # type: ignore[arg-type]
        self.variants._loaded["v"] = SimpleNamespace(ready=True, block_tokens=16)  # type: ignore[assignment]
        self.waiting: list[Entry[Assignment]] = []
        self.reads = 0
        self.forgotten: list[Entry[Assignment]] = []
        self.intake = Intake(
            worker_id="w",
            assignments=self,  # type: ignore[arg-type]
            records=self.records,  # type: ignore[arg-type]
            table=self.table,
            variants=self.variants,
            send=self.engines.send,
            loads=Loads(),  # type: ignore[arg-type]
            chains=RequestChains(),
        )

    async def read_group(self, *_: object, **__: object) -> list[Entry[Assignment]]:
        self.reads += 1
        await asyncio.sleep(0)
        waiting, self.waiting = self.waiting, []
        return waiting

    async def take(self, *entries: Entry[Assignment]) -> None:
        self.waiting = list(entries)
        before = self.reads
        reading = asyncio.create_task(self.intake.run())
        while self.reads < before + 2 and not reading.done():  # What it read is dealt with by its next read.
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled(), reading.exception()
        for gone in self.engines.gone:
            self.intake.gone(gone)
        for refused in self.engines.refused:
            self.intake.refused(refused)
        await asyncio.sleep(0)

    @property
    def in_engine(self) -> list[str]:
        return list(self.engines.sequences.values())

    def step(self, entry: Entry[Assignment], *tokens: int, first: int = 0, ends: bool = False) -> StepNews:
        """What the engine makes of the first choice of a request, whether the worker still wants it."""
        handle = self.engines.handles[sequence_name(entry.fact.request, 0)]
        outputs = [Output(handle, first + number, token) for number, token in enumerate(tokens)]
        if ends:
            outputs.append(Output(handle, first + len(tokens), finish_reason="length"))
        return StepNews(variant="v", outputs=tuple(outputs))

    def batch(self) -> TokenBatch:
        return self.table.outbox("g")._batch()


@pytest.fixture
async def bench() -> Bench:
    return Bench()


def sequence_name(request: AdmittedRequest, choice: int) -> str:
    return f"{request.request_id}#{choice}@{request.attempt}"


def assigned(entry_id: str, *, attempt: int = 1, n: int = 1, **sampling: Any) -> Entry[Assignment]:
    request = AdmittedRequest(
        request_id="r",
        kind=RequestKind.REQUEST_KIND_GENERATE,
        attempt=attempt,
        gateway_id="g",
        prompt_token_ids=[1, 2],
        sampling=inference.SamplingParameters(max_tokens=10, n=n, **sampling),
    )
    return Entry(entry_id.encode(), Assignment(request=request, variant="v", worker_id="w"))


async def test_a_later_attempt_on_the_same_worker_takes_the_place_of_the_earlier(bench: Bench) -> None:
    first, second = assigned("1-0"), assigned("2-0", attempt=2)
    await bench.take(first)
    await bench.take(second)
    assert bench.in_engine == [sequence_name(second.fact.request, 0)]
    assert bench.records.done == [("let_go", b"1-0")], "the overtaken assignment is no load any more"
    # What the engine had made of the first one before it heard of the second comes late.
    bench.table.on_step(bench.step(first, 7, 8, 9, ends=True))
    bench.table.on_step(bench.step(second, 7))
    [update] = bench.batch().updates
    assert list(update.token_ids) == [7]
    assert not update.HasField("finished")


async def test_an_overtaken_assignment_that_comes_late_is_let_go(bench: Bench) -> None:
    await bench.take(assigned("2-0", attempt=2), assigned("1-0"))
    assert len(bench.in_engine) == 1
    assert bench.records.done == [("let_go", b"1-0")]


async def test_the_same_assignment_twice_is_one(bench: Bench) -> None:
    await bench.take(assigned("1-0"), assigned("1-0"))
    assert len(bench.in_engine) == 1
    assert bench.records.done == []


async def test_what_is_stopped_runs_no_longer(bench: Bench) -> None:
    entry = assigned("1-0", n=2)
    await bench.take(entry)
    assert bench.table.stop("r", 0)
    assert bench.in_engine == [sequence_name(entry.fact.request, 1)]
    assert bench.table.stop("r", None)
    assert bench.in_engine == []


async def test_a_choice_stopped_elsewhere_does_not_stop_a_request_that_comes_later(bench: Bench) -> None:
    assert not bench.table.stop("r", 0)
    await bench.take(assigned("1-0", n=2))
    assert len(bench.in_engine) == 2


async def test_a_draining_worker_hands_back_what_it_is_assigned(bench: Bench) -> None:
    bench.intake.drain()
    await bench.take(assigned("1-0"))
    assert bench.records.done == [("requeue", ("w",)), ("let_go", b"1-0")]
    assert bench.in_engine == [] and len(bench.table) == 0
    assert bench.intake.handed_back == 1


async def test_handing_back_waits_for_redis(bench: Bench) -> None:
    bench.intake.drain()
    bench.records.away = True
    bench.waiting = [assigned("1-0")]
    reading = asyncio.create_task(bench.intake.run())
    await asyncio.sleep(0.05)
    bench.records.away = False
    while not bench.intake.handed_back:
        await asyncio.sleep(0.01)
    reading.cancel()
    assert [what for what, _ in bench.records.done] == ["requeue", "let_go"]


async def test_an_assignment_for_a_variant_that_left_goes_to_another_worker(bench: Bench) -> None:
    bench.variants.get("v").ready = False
    await bench.take(assigned("1-0"))
    assert bench.records.done[0] == ("requeue", ("w",))


async def test_a_request_that_meets_an_engine_just_gone_goes_to_another_worker(bench: Bench) -> None:
    bench.engines.is_loaded = False
    await bench.take(assigned("1-0"))
    assert [what for what, _ in bench.records.done] == ["requeue", "let_go"]
    assert len(bench.table) == 0 and bench.in_engine == []


async def test_a_request_that_the_engine_refuses_ends_with_its_error(bench: Bench) -> None:
    bench.engines.refuses = True
    await bench.take(assigned("1-0", n=2))
    ends = [update.finished for update in bench.batch().updates]
    assert [(end.error_code, end.error_message) for end in ends] == [("invalid_request", "no")] * 2


async def test_what_the_engine_says_of_a_request_that_was_overtaken_meanwhile_is_nothing(
    bench: Bench,
) -> None:
    first, second = assigned("1-0"), assigned("2-0", attempt=2)
    await bench.take(first)
    handle = bench.engines.handles[sequence_name(first.fact.request, 0)]
    await bench.take(second)
    bench.intake.refused(Refused((handle,), "invalid_request", "no"))
    bench.intake.gone(Gone((handle,)))
    assert len(bench.table) == 1
    assert bench.records.done == [("let_go", b"1-0")]


async def test_every_second_of_a_step_is_billed_once(bench: Bench) -> None:
    entries = [assigned(f"{number}-0") for number in range(3)]
    for number, entry in enumerate(entries):
        entry.fact.request.request_id = f"r{number}"
    await bench.take(*entries)
    handles = [bench.engines.handles[f"r{number}#0@1"] for number in range(3)]
    news = StepNews(
        variant="v",
        seconds=0.6,
        token_s=0.1,
        tokens=array("q", [handles[0], 0, 7, handles[1], 0, 8]),
        work=(Work(handles[2], 0.3), Work(handles[2], 0.1)),
    )
    _, billed_s = bench.table.on_step(news)
    assert billed_s == pytest.approx(0.6)
    for number, expected_s in enumerate((0.1, 0.1, 0.4)):
        live = bench.table.request_of(handles[number])
        assert live is not None and live.engine_s == pytest.approx(expected_s)
    assert {tuple(update.token_ids) for update in bench.batch().updates} == {(7,), (8,)}


async def test_a_variant_with_work_is_not_freed(bench: Bench) -> None:
    await bench.take(assigned("1-0"))
    unloading = asyncio.create_task(bench.variants.unload("v"))
    again = asyncio.create_task(bench.variants.unload("v"))
    await asyncio.sleep(0.1)
    assert not unloading.done() and bench.engines.is_loaded
    bench.engines.sequences.clear()
    await asyncio.gather(unloading, again)
    assert not bench.engines.is_loaded and bench.variants.find("v") is None


async def test_a_request_that_the_engine_refuses_ends_once(bench: Bench) -> None:
    entry = assigned("1-0")
    live = LiveRequest(entry.fact, entry.entry_id, "g", new_choices((), 1), 12)
    bench.table.add(live)
    bench.table.fail(live, code="x", message="no")
    bench.table.fail(live, code="y", message="no")
    await bench.table.settle()
    assert len(bench.events.published) == 1
    bench.table.confirm_complete("r")
    await bench.table.settle()
    assert bench.records.done == [("end", b"1-0")]
    assert b"1-0" not in bench.table.held_entries


async def test_a_leaving_worker_does_not_wait_for_redis_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trireme.worker.request_table.SETTLING_S", 0.05)
    bench.records.away = True
    bench.table.let_go(b"1-0", assigned("1-0").fact)
    async with asyncio.timeout(60):
        await bench.table.settle()
    assert b"1-0" in bench.table.held_entries, "it is not acknowledged"


def test_an_unknown_kind_is_refused() -> None:
    for kind in (0, 99):
        with pytest.raises(InvalidRequest):
            sequences_of(AdmittedRequest(request_id="r", kind=kind, prompt_token_ids=[1]), [0])  # type: ignore[arg-type]


def backlog(tokens: int, *, n: int, logprobs: int | None) -> LiveRequest:
    sampling: dict[str, Any] = {} if logprobs is None else {"logprobs": logprobs}
    entry = assigned("1-0", n=n, **sampling)
    live = LiveRequest(entry.fact, entry.entry_id, "g", new_choices((), n), 0)
    one = inference.TokenLogprob(token_id=100_000, logprob=-0.1)
    for choice in live.choices:
        choice.token_ids = list(range(tokens))
        if logprobs is not None:
            position = inference.PositionLogprobs(chosen=one, top=[one] * logprobs)
            choice.logprobs = [position] * tokens
    return live


@pytest.mark.parametrize(("tokens", "n", "logprobs"), [(32_768, 4, 20), (32_768, 16, None), (20_000, 2, 0)])
async def test_a_long_answer_is_replayed_in_messages_that_fit(
    bench: Bench, tokens: int, n: int, logprobs: int | None
) -> None:
    live = backlog(tokens, n=n, logprobs=logprobs)
    bench.table.add(live)
    bench.table.stop("r", None)
    have = [0] * n
    finished = usages = 0
    while True:
        batch = bench.batch()
        if not batch.updates:
            break
        assert batch.ByteSize() < MESSAGE_LIMIT_BYTES / 2
        for update in batch.updates:
            assert update.first_index == have[update.choice], "in order, without a gap"
            assert not usages, "the account comes last"
            have[update.choice] += len(update.token_ids)
            assert len(update.logprobs) == (0 if logprobs is None else len(update.token_ids))
            if update.HasField("finished"):
                assert have[update.choice] == tokens
                finished += 1
            usages += update.HasField("usage")
    assert (have, finished, usages) == ([tokens] * n, n, 1)


async def test_a_long_replay_does_not_hold_up_the_others(bench: Bench) -> None:
    long = backlog(32_768, n=8, logprobs=20)
    bench.table.add(long)
    short = assigned("2-0")
    short.fact.request.request_id = "short"
    await bench.take(short)
    bench.table.outbox("g").mark(long)
    bench.table.on_step(bench.step(short, 7))
    named = {update.request_id for update in bench.batch().updates}
    assert "short" in named
    assert long.has_news


async def test_many_unknown_ids_come_in_messages_that_fit(bench: Bench) -> None:
    box = bench.table.outbox("g")
    for number in range(10_000):
        box.mark_unknown(f"{number:0128d}")
        box.mark_unknown(f"{number:0128d}")
    found: list[str] = []
    while batch := bench.batch().unknown:
        assert len(batch) * 130 < MAX_BATCH_BYTES
        found.extend(batch)
    assert len(found) == 10_000


class Stream:
    """A gateway's connection that takes one message at a time."""

    def __init__(self, bench: Bench) -> None:
        self.box = bench.table.outbox("g")
        self.box.stream = self
        self.until = asyncio.create_task(asyncio.sleep(60))
        self.messages = self.box.batches(self, until=self.until)

    async def next(self) -> TokenBatch:
        """The next message, which is due or will be."""
        async with asyncio.timeout(60):
            return await anext(self.messages)


async def test_tokens_that_follow_others_wait_for_the_pace_and_an_end_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trireme.worker.outboxes.PACE_S", 1000.0)
    entry = assigned("1-0")
    await bench.take(entry)
    stream = Stream(bench)
    bench.table.on_step(bench.step(entry, 7))
    first = await stream.next()
    assert [list(update.token_ids) for update in first.updates] == [[7]]
    handle = bench.engines.handles[sequence_name(entry.fact.request, 0)]
    for index in (1, 2):
        bench.table.on_step(StepNews(variant="v", tokens=array("q", [handle, index, 70 + index])))
    waiting = asyncio.create_task(anext(stream.messages))
    await asyncio.sleep(0.05)
    assert not waiting.done(), "what only goes on with an answer keeps the pace"
    bench.table.on_step(bench.step(entry, first=3, ends=True))
    last = await waiting
    assert [list(update.token_ids) for update in last.updates] == [[71, 72]]
    assert last.updates[0].HasField("finished")
    stream.until.cancel()


async def test_what_follows_is_sent_when_the_pace_allows_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trireme.worker.outboxes.PACE_S", 0.01)
    entry = assigned("1-0")
    await bench.take(entry)
    stream = Stream(bench)
    bench.table.on_step(bench.step(entry, 7))
    await stream.next()
    handle = bench.engines.handles[sequence_name(entry.fact.request, 0)]
    got: list[int] = []
    for index in range(1, 20):
        bench.table.on_step(StepNews(variant="v", tokens=array("q", [handle, index, 70 + index])))
        if index % 5 == 0:
            message = await anext(stream.messages)
            assert set(message.lanes) == {handle}
            assert list(message.indices) == list(range(len(got) + 1, index + 1))
            got += message.token_ids
    assert got == list(range(71, 86))
    stream.until.cancel()
