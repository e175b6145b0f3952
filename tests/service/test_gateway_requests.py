"""The life of a request at the gateway: exactly once, through cancels, losses and other gateways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from tests.service.gateway_fleet import CHECKPOINT, KEYS, FakeWorker, Fleet, fleet
from trireme.bus.request_records import State
from trireme.client import (
    Accepted,
    ChoiceFinished,
    Delta,
    Event,
    FinishReason,
    Paused,
    Sampling,
    Summary,
    TriremeClient,
)
from trireme.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestCancelled,
    RequestConflict,
    RequestFailed,
    RequestNotFound,
    RequestQuarantined,
    TriremeError,
)
from trireme.wire.inference.v1 import inference_pb2 as wire
from trireme.wire.inference.v1.inference_pb2_grpc import InferenceStub

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
TEXT = "def add(a, b):\n    return a + b  # 😀 é\n"
IDS = TOKENIZER.encode(TEXT).ids


@pytest.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(redis_url, tmp_path) as made:
        yield made


class Call:
    """One generate call, read in the background."""

    def __init__(self, client: TriremeClient, **options: Any) -> None:
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self._changed = asyncio.Condition()
        prompt = options.pop("prompt", "x = ")
        sampling = options.pop("sampling", Sampling(max_tokens=64, seed=1))
        self.stream = client.generate(options.pop("model", "py"), prompt, sampling, **options)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self.stream:
                async with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
        except TriremeError as error:
            self.error = error
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: condition() or self.task.done())
            assert condition(), (self.events, self.error)

    async def end(self) -> list[Event]:
        async with asyncio.timeout(60):
            await self.task
        if self.error is not None:
            raise self.error
        return self.events

    def tokens(self, choice: int = 0) -> list[int]:
        deltas = [e for e in self.events if isinstance(e, Delta) and e.choice == choice]
        position = 0
        for delta in deltas:
            assert delta.first_index == position
            position += len(delta.token_ids)
        return [token for delta in deltas for token in delta.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta) and e.choice == choice)

    def kinds(self) -> list[type]:
        return [type(event) for event in self.events]


async def test_a_request_streams_from_acceptance_to_summary(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client, session_id="s", slo="interactive", priority=3)
        assignment = await world.workers[0].next_assignment()
        request = assignment.request
        assert list(request.prompt_token_ids) == TOKENIZER.encode("x = ").ids
        assert (request.session_id, request.priority, request.attempt) == ("s", 3, 1)
        assert (request.slo_class, request.sampling.seed, request.sampling.n) == (1, 1, 1)
        assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
        world.workers[0].answer(assignment, IDS)
        events = await call.end()
        assert (call.tokens(), call.text()) == (IDS, TEXT)
        assert isinstance(events[0], Accepted) and not events[0].attached
        assert events[-2] == ChoiceFinished(0, FinishReason.STOP, "")
        summary = events[-1]
        assert isinstance(summary, Summary)
        assert summary.usage.completion_tokens == len(IDS)
        assert summary.usage.cached_prompt_tokens == 3
        assert (summary.usage.joules, summary.usage.grams_co2e) == (2.0, 0.25)
        assert (summary.variant, summary.worker_id, summary.attempts) == ("py-1m", "w1", 1)
        assert summary.decision == "the only one"
        confirm = await world.workers[0].heard("confirm")
        assert confirm.complete and list(confirm.received) == [len(IDS)]


async def test_choices_stop_strings_and_logprobs(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        sampling = Sampling(max_tokens=64, n=2, stop=["return"], logprobs=1)
        call = Call(client, sampling=sampling)
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        row = wire.PositionLogprobs(
            chosen=wire.TokenLogprob(token_id=IDS[0], logprob=-0.5),
            top=[wire.TokenLogprob(token_id=IDS[1], logprob=-0.25)],
        )
        for choice in range(2):
            worker.emit(assignment, choice=choice, ids=IDS, logprobs=[row] * len(IDS))
        stop = await worker.heard("stop")
        assert (stop.reason, stop.HasField("choice")) == ("stop_string", True)
        for choice in range(2):
            end = wire.FINISH_REASON_CANCELLED
            worker.emit(assignment, choice=choice, first=len(IDS), finish=end, last=choice == 1)
        events = await call.end()
        assert call.text(0) == call.text(1) == "def add(a, b):\n    "
        ends = [event for event in events if isinstance(event, ChoiceFinished)]
        assert [(end.reason, end.stop_string) for end in ends] == [(FinishReason.STOP, "return")] * 2
        delta = next(event for event in events if isinstance(event, Delta))
        assert delta.logprobs[0].chosen.raw == b"def" and delta.logprobs[0].chosen.text == "def"
        assert delta.logprobs[0].top[0].logprob == -0.25
        assert isinstance(events[-1], Summary) and events[-1].usage.joules == 2.0


async def test_a_summary_comes_after_a_stop_string_even_if_the_account_does_not(world: Fleet) -> None:
    async with world.gateway(usage_wait_s=0.1) as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client, sampling=Sampling(stop=["return"]))
        worker = world.workers[0]
        worker.emit(await worker.next_assignment(), ids=IDS)
        events = await call.end()
        assert isinstance(events[-1], Summary) and events[-1].usage.joules == 0.0


async def test_doubled_and_missing_batches_still_deliver_each_index_once(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        gateway_id = assignment.request.gateway_id
        make = worker.update
        worker.outputs[assignment.request.request_id] = [make(assignment, ids=IDS, finish=1)]
        first = make(assignment, ids=IDS[:4])
        worker.send(gateway_id, first)
        worker.send(gateway_id, first, make(assignment, first=2, ids=IDS[2:5]))
        worker.send(gateway_id, make(assignment, first=9, ids=IDS[9:], finish=1))  # 5 to 8 were lost.
        await call.end()
        assert (call.tokens(), call.text()) == (IDS, TEXT)
        assert (await worker.heard("attach")).request_id == assignment.request.request_id


async def test_a_client_that_leaves_before_the_first_token_stops_the_request(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        await call.until(lambda: call.events)
        call.task.cancel()
        stop = await worker.heard("stop", assignment.request.request_id)
        assert stop.reason == "client" and not stop.HasField("choice")
        standing = await wait_state(worker, assignment.request.request_id, State.CANCELLED)
        assert standing
        # The worker's last word finds nobody, and is confirmed so that the worker may forget.
        worker.emit(assignment, finish=wire.FINISH_REASON_CANCELLED)
        assert (await worker.heard("confirm")).request_id == assignment.request.request_id


async def test_a_client_that_leaves_before_the_assignment_stops_it_everywhere(world: Fleet) -> None:
    world.scheduler.holding.set()
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client, request_id="early")
        await call.until(lambda: call.events)
        call.task.cancel()
        await world.workers[0].heard("stop", "early")
        assert await wait_state(world.workers[0], "early", State.CANCELLED)
        world.scheduler.holding.clear()
        again = Call(client, request_id="next")
        assert (await world.workers[0].next_assignment()).request.request_id == "next"
        again.task.cancel()


async def test_a_client_that_takes_nothing_is_given_up(world: Fleet) -> None:
    worker = world.workers[0]
    async with (
        world.gateway(stall_s=0.3, flush_interval_s=0.0) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        sampling = wire.SamplingParameters(n=16, logprobs=20, ignore_eos=True)
        request = wire.GenerateRequest(model="py", text="x", sampling=sampling)
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        call = stub.Generate(request)
        assert (await call.read()).WhichOneof("event") == "accepted"
        assignment = await worker.next_assignment()
        row = wire.PositionLogprobs(chosen=wire.TokenLogprob(token_id=5, logprob=-1.0))
        row.top.extend(wire.TokenLogprob(token_id=i, logprob=-2.0) for i in range(20))
        for start in range(0, 1500, 100):
            for choice in range(16):
                worker.emit(assignment, choice=choice, first=start, ids=[5] * 100, logprobs=[row] * 100)
            await asyncio.sleep(0.01)
        stop = await worker.heard("stop", assignment.request.request_id)
        assert stop.reason == "client"
        async with asyncio.timeout(60):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert ended.value.code() is grpc.StatusCode.CANCELLED


async def test_cancel_by_id_from_another_gateway(world: Fleet) -> None:
    async with (
        world.gateway() as one,
        world.gateway() as two,
        TriremeClient([one.grpc_address]) as client,
        TriremeClient([two.grpc_address]) as other,
    ):
        call = Call(client, request_id="c1")
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        worker.emit(assignment, ids=IDS[:3])
        await call.until(lambda: len(call.tokens()) == 3)
        assert await other.cancel("c1")
        await worker.heard("stop", "c1")
        worker.emit(assignment, first=3, finish=wire.FINISH_REASON_CANCELLED)
        events = await call.end()
        assert ChoiceFinished(0, FinishReason.CANCELLED, "") in events
        assert not await other.cancel("c1")
        assert not await other.cancel("never-was")
        # Waiting for a worker: nobody will say a last word, so the record does.
        world.scheduler.holding.set()
        waiting = Call(client, request_id="c2")
        await waiting.until(lambda: waiting.events)
        assert await other.cancel("c2")
        with pytest.raises(RequestCancelled):
            await waiting.end()


async def test_a_lost_worker_means_a_pause_and_the_rest_from_another(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        assignment = await world.workers[0].next_assignment()
        world.workers[0].emit(assignment, ids=IDS[:5])
        await call.until(lambda: len(call.tokens()) == 5)
        await world.workers[0].die()
        moved = await second.next_assignment()
        assert [list(tokens.ids) for tokens in moved.request.delivered] == [IDS[:5]]
        assert (moved.request.attempt, moved.request.crashes) == (2, 1)
        assert list(moved.request.avoid_worker_ids) == ["w1"]
        second.emit(moved, first=5, ids=IDS[5:], finish=1)
        events = await call.end()
        assert (call.tokens(), call.text()) == (IDS, TEXT)
        assert Paused in call.kinds()
        assert isinstance(events[-1], Summary)
        assert (events[-1].attempts, events[-1].worker_id) == (2, "w2")
        assert events[-1].paused_s > 0


async def test_a_worker_that_leaves_in_order_counts_no_crash(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        assignment = await world.workers[0].next_assignment()
        world.workers[0].emit(assignment, ids=IDS[:5])
        await call.until(lambda: len(call.tokens()) == 5)
        await world.workers[0].leave(gateway)
        moved = await second.next_assignment()
        assert (moved.request.attempt, moved.request.crashes) == (2, 0)
        second.emit(moved, first=5, ids=IDS[5:], finish=1)
        await call.end()
        assert call.tokens() == IDS


async def test_an_assignment_that_its_worker_never_answered_is_served_elsewhere(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        await world.workers[0].next_assignment()  # Read, so that its engine may have had it.
        await world.workers[0].die()
        moved = await second.next_assignment()
        assert (moved.request.attempt, moved.request.crashes) == (2, 1)
        second.answer(moved, IDS)
        await call.end()
        assert call.tokens() == IDS


async def test_a_request_that_was_in_two_crashes_is_quarantined(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client, request_id="poison")
        for worker in (world.workers[0], second):
            assignment = await worker.next_assignment()
            worker.emit(assignment, first=len(call.tokens()), ids=IDS[:1] if worker is not second else [])
            await call.until(lambda: len(call.tokens()) == 1)
            await asyncio.sleep(0.1)
            await worker.die()
        with pytest.raises(RequestQuarantined):
            await call.end()
        third = Call(client, request_id="poison")
        with pytest.raises(RequestQuarantined):
            await third.end()


async def test_one_crash_counts_once_though_the_next_attempt_went_there_too(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        first = await world.workers[0].next_assignment()
        world.workers[0].emit(first, ids=IDS[:3])
        await call.until(lambda: len(call.tokens()) == 3)
        world.scheduler.mistakes.append("w1")
        await world.workers[0].die()
        moved = await second.next_assignment()
        assert (moved.request.attempt, moved.request.crashes) == (3, 1)
        second.emit(moved, first=3, ids=IDS[3:], finish=1)
        await call.end()
        assert call.tokens() == IDS


async def test_a_requeue_by_somebody_else_is_followed(world: Fleet) -> None:
    second = await world.add_worker("w2")
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        call = Call(client)
        first = await world.workers[0].next_assignment()
        world.workers[0].emit(first, ids=IDS[:5])
        await call.until(lambda: len(call.tokens()) == 5)
        # The reaper knows no delivered prefix: the new attempt starts at index 0.
        request = first.request
        request.avoid_worker_ids.append("w1")
        await world.workers[0].records.requeue(request, crashed=False)
        moved = await second.next_assignment()
        second.emit(moved, ids=IDS[:6])
        await call.until(lambda: len(call.tokens()) == 6)
        world.workers[0].emit(first, first=6, ids=[0, 0, 0])  # The older attempt is not dead yet.
        await asyncio.sleep(0.1)
        second.emit(moved, first=6, ids=IDS[6:], finish=1)
        await call.end()
        assert call.tokens() == IDS


async def test_a_request_whose_record_was_lost_is_admitted_again(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        world.scheduler.holding.set()
        call = Call(client, request_id="lost")
        await call.until(lambda: call.events)
        await world.redis.delete(KEYS.requests, KEYS.request("lost"))
        world.scheduler.holding.clear()
        world.scheduler.workers.clear()
        await asyncio.sleep(0.2)
        world.scheduler.workers.append("w1")
        assignment = await world.workers[0].next_assignment()
        world.workers[0].answer(assignment, IDS)
        await call.end()
        assert call.tokens() == IDS


async def test_an_answer_goes_on_at_another_gateway_when_one_dies(world: Fleet) -> None:
    worker = world.workers[0]
    async with world.gateway() as other:
        stack = world.gateway()
        dying = await stack.__aenter__()
        async with TriremeClient([dying.grpc_address, other.grpc_address]) as client:
            client._addresses._position = 0
            call = Call(client)
            assignment = await worker.next_assignment()
            worker.emit(assignment, ids=IDS[:5])
            await call.until(lambda: len(call.tokens()) == 5)
            await stack.__aexit__(None, None, None)
            await worker.heard("attach", assignment.request.request_id)
            worker.emit(assignment, first=5, ids=IDS[5:], finish=1)
            events = await call.end()
            assert (call.tokens(), call.text()) == (IDS, TEXT)
            assert [e for e in events if isinstance(e, Accepted)] == events[:1]
            assert Paused in call.kinds()
            assert not [m for m in worker.messages if m.HasField("stop")]


async def test_a_stream_resumed_anywhere_joins_without_a_seam(world: Fleet) -> None:
    worker = world.workers[0]
    split = next(i for i in range(len(IDS)) if TOKENIZER.decode(IDS[:i]).endswith("\ufffd"))
    async with (
        world.gateway() as one,
        world.gateway() as two,
        TriremeClient([one.grpc_address]) as client,
        grpc.aio.insecure_channel(two.grpc_address) as channel,
    ):
        for have in (0, 1, split - 1, split, split + 1, len(IDS) - 2):
            first = Call(client, request_id=f"mid-{have}")
            assignment = await worker.next_assignment()
            for index in range(have):
                worker.emit(assignment, first=index, ids=IDS[index : index + 1])
            await first.until(lambda first=first, have=have: len(first.tokens()) == have)
            # What is made from now on may reach both.
            had = first.text()
            request = wire.GenerateRequest(request_id=f"mid-{have}", model="py", text="x = ")
            request.resume_from.append(have)
            stream = aiter(InferenceStub(channel).Generate(request))
            accepted = await anext(stream)
            assert accepted.accepted.attached and accepted.accepted.seed == 1
            await worker.heard("attach", f"mid-{have}")
            worker.emit(assignment, first=have, ids=IDS[have:], finish=1)
            tokens, text = have, ""
            async for response in stream:
                if response.HasField("delta"):
                    assert response.delta.first_index == tokens
                    tokens += len(response.delta.token_ids)
                    text += response.delta.text
            assert had + text == TEXT
            first.task.cancel()


async def test_two_calls_that_resume_one_request_at_once_both_have_it(
    world: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = world.workers[0]
    async with (
        world.gateway() as one,
        world.gateway() as two,
        TriremeClient([one.grpc_address]) as client,
        TriremeClient([two.grpc_address]) as elsewhere,
    ):
        first = Call(client, request_id="both")
        assignment = await worker.next_assignment()
        worker.emit(assignment, ids=IDS[:3])
        await first.until(lambda: len(first.tokens()) == 3)

        standing, asked, go = two.core._records.standing, asyncio.Event(), asyncio.Event()

        async def slow(request_id: str) -> Any:
            asked.set()
            await go.wait()
            return await standing(request_id)

        monkeypatch.setattr(two.core._records, "standing", slow)
        calls = [Call(elsewhere, request_id="both")]
        await asked.wait()
        calls.append(Call(elsewhere, request_id="both"))
        while len(two.core._answers) == 0:
            await asyncio.sleep(0.01)
        go.set()
        await worker.heard("attach", "both")
        worker.emit(assignment, first=3, ids=IDS[3:], finish=1)
        for call in calls:
            await call.end()
            assert (call.error, call.tokens()) == (None, IDS)
        first.task.cancel()


async def test_an_id_that_is_in_use_for_something_else_is_refused(world: Fleet) -> None:
    async with (
        world.gateway() as one,
        world.gateway() as two,
        TriremeClient([one.grpc_address]) as client,
        TriremeClient([two.grpc_address]) as other,
    ):
        call = Call(client, request_id="same")
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        for asker in (client, other):
            with pytest.raises(RequestConflict, match="another prompt"):
                await Call(asker, request_id="same", prompt="other").end()
        shared = Call(client, request_id="same")
        worker.answer(assignment, IDS)
        await call.end()
        await shared.end()
        assert shared.tokens() == call.tokens() == IDS
        await worker.heard("confirm", "same")
        worker.outputs.clear()
        worker.known.clear()
        with pytest.raises(RequestNotFound):
            await Call(other, request_id="same").end()


async def test_a_failure_of_the_engine_ends_one_request_alone(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        worker = world.workers[0]
        bad, good = Call(client, request_id="bad"), Call(client, request_id="good")
        for _ in range(2):
            assignment = await worker.next_assignment()
            if assignment.request.request_id == "bad":
                error = ("request_failed", "NaN in logits")
                worker.emit(assignment, finish=wire.FINISH_REASON_ERROR, error=error)
            else:
                worker.answer(assignment, IDS)
        with pytest.raises(RequestFailed, match="NaN in logits"):
            await bad.end()
        await good.end()
        assert good.tokens() == IDS
        await worker.heard("confirm", "bad")


async def test_full_queues_say_no_with_a_time_to_come_back(world: Fleet) -> None:
    world.scheduler.workers.clear()
    async with (
        world.gateway(max_waiting=2, max_inflight=3) as gateway,
        TriremeClient([gateway.grpc_address], retry_s=0.0) as client,
    ):
        waiting = [Call(client) for _ in range(2)]
        for call in waiting:
            await call.until(lambda call=call: call.events)
        with pytest.raises(Overloaded, match="2 requests wait") as caught:
            await Call(client).end()
        assert 1.0 <= (caught.value.retry_after_s or 0.0) <= 60.0
    async with (
        world.gateway(max_inflight=1) as gateway,
        TriremeClient([gateway.grpc_address], retry_s=0.0) as client,
    ):
        call = Call(client)
        await call.until(lambda: call.events)
        with pytest.raises(Overloaded, match="this gateway holds 1"):
            await Call(client).end()


@pytest.mark.parametrize(
    ("error", "param", "options"),
    [
        (ModelNotFound, "model", {"model": "gpt"}),
        (InvalidRequest, "text", {"prompt": ""}),
        (InvalidRequest, "token_ids", {"prompt": [5000]}),
        (ContextLengthExceeded, "token_ids", {"prompt": [5] * 2048}),
        (ContextLengthExceeded, "max_tokens", {"sampling": Sampling(max_tokens=2048)}),
        (InvalidRequest, "max_tokens", {"sampling": Sampling(max_tokens=0)}),
        (InvalidRequest, "n", {"sampling": Sampling(n=17)}),
        (InvalidRequest, "temperature", {"sampling": Sampling(temperature=float("nan"))}),
        (InvalidRequest, "top_p", {"sampling": Sampling(top_p=0.0)}),
        (InvalidRequest, "min_p", {"sampling": Sampling(min_p=1.5)}),
        (InvalidRequest, "presence_penalty", {"sampling": Sampling(presence_penalty=-3)}),
        (InvalidRequest, "repetition_penalty", {"sampling": Sampling(repetition_penalty=0)}),
        (InvalidRequest, "logit_bias", {"sampling": Sampling(logit_bias={5: 101.0})}),
        (InvalidRequest, "logit_bias", {"sampling": Sampling(logit_bias={9999: 1.0})}),
        (InvalidRequest, "logit_bias", {"sampling": Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))}),
        (InvalidRequest, "logprobs", {"sampling": Sampling(logprobs=21)}),
        (InvalidRequest, "stop", {"sampling": Sampling(stop=["a"] * 17)}),
        (InvalidRequest, "stop", {"sampling": Sampling(stop=["a" * 257])}),
        (InvalidRequest, "stop", {"sampling": Sampling(stop=[""])}),
        (InvalidRequest, "stop_token_ids", {"sampling": Sampling(stop_token_ids=[4096])}),
        (InvalidRequest, "min_tokens", {"sampling": Sampling(max_tokens=4, min_tokens=5)}),
        (InvalidRequest, "priority", {"priority": 101}),
        (InvalidRequest, "request_id", {"request_id": "with space"}),
        (InvalidRequest, "chat", {"prompt": [{"role": "u", "content": "x"}] * 2049}),
        (InvalidRequest, "messages", {"prompt": [{"role": "unknown", "content": "x"}]}),
    ],
)
async def test_what_is_out_of_range_is_refused_by_name(
    redis_url: str, tmp_path: Path, error: type[TriremeError], param: str, options: dict[str, Any]
) -> None:
    async with (
        fleet(redis_url, tmp_path, workers=0) as world,
        world.gateway() as gateway,
        TriremeClient([gateway.grpc_address]) as client,
    ):
        with pytest.raises(error) as caught:
            await Call(client, **options).end()
        assert caught.value.param == param
        assert await world.redis.xlen(KEYS.requests) == 0


async def test_classify_and_embed_go_the_same_way(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        worker = world.workers[0]
        labels = [" yes", " no", " maybe so"]
        task = asyncio.create_task(client.classify("py", "Is it?", labels, normalise_length=True))
        assignment = await worker.next_assignment()
        request = assignment.request
        assert [TOKENIZER.decode(list(c.ids)) for c in request.continuations] == labels
        lengths = [len(c.ids) for c in request.continuations]
        worker.emit(assignment, finish=1, scores=[-2.0 * lengths[0], -1.0 * lengths[1], -3.0 * lengths[2]])
        answer = await task
        found = [(score.label, score.logprob) for score in answer.scores]
        assert found == [(" no", -1.0), (" yes", -2.0), (" maybe so", -3.0)]
        assert sum(s.probability for s in answer.scores) == pytest.approx(1.0)

        embedding = asyncio.create_task(client.embed("py", ["a", "b"]))
        for _ in range(2):
            assignment = await worker.next_assignment()
            which = float(TOKENIZER.decode(list(assignment.request.prompt_token_ids)) == "b")
            worker.emit(assignment, finish=1, embedding=[1.0 - which, which])
        result = await embedding
        assert result.vectors == ((1.0, 0.0), (0.0, 1.0))
        assert result.usage.joules == 4.0
        for bad in ([" one"], [" same", " same"], [" ok", ""]):
            with pytest.raises(InvalidRequest):
                await client.classify("py", "x", bad)
        with pytest.raises(InvalidRequest):
            await client.embed("py", [])


async def test_list_models_names_models_and_variants(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        models = {model.name: model for model in await client.list_models()}
        assert {name: model.variant_of for name, model in models.items()} == {
            "py": "",
            "py-1m": "py",
            "py-1m-half": "py",
        }
        assert [models[name].ready for name in ("py", "py-1m", "py-1m-half")] == [True, True, False]
        assert (models["py"].context_tokens, models["py"].vocabulary_size) == (2048, 4096)


async def test_the_tenant_header_is_believed_only_where_it_is_trusted(world: Fleet) -> None:
    seen = []
    for trusted in (False, True):
        async with (
            world.gateway(trust_tenant_header=trusted) as gateway,
            grpc.aio.insecure_channel(gateway.grpc_address) as channel,
        ):
            request = wire.GenerateRequest(model="py", text="a" * 200)
            parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
            stream = InferenceStub(channel).Generate(
                request, metadata=(("x-trireme-tenant", "acme"), ("traceparent", parent))
            )
            await stream.read()
            admitted = (await world.workers[0].next_assignment()).request
            stream.cancel()
            assert admitted.traceparent == parent
            seen.append((admitted.tenant, admitted.kv_salt, admitted.prefix_hashes[:16]))
    assert [tenant for tenant, _, _ in seen] == ["default", "acme"]
    assert seen[0][1] != seen[1][1] and seen[0][2] != seen[1][2]


async def test_a_prompt_that_outgrows_the_context_is_refused_or_cut_as_the_client_says(world: Fleet) -> None:
    async with world.gateway() as gateway, TriremeClient([gateway.grpc_address]) as client:
        prompt = [index % 4000 for index in range(3000)]
        with pytest.raises(ContextLengthExceeded, match="2048"):
            await Call(client, prompt=prompt).end()
        call = Call(client, prompt=prompt, context_overflow="truncate_pinned", pinned_tokens=40)
        assignment = await world.workers[0].next_assignment()
        request = assignment.request
        kept = list(request.prompt_token_ids)
        head, cut = request.truncation.head_tokens, request.truncation.cuts[-1]
        assert head == 48 and kept == prompt[:48] + prompt[cut:]
        assert len(kept) + request.sampling.max_tokens <= 2048
        assert len(request.prefix_hashes) == 16 * (len(kept) // 16)
        world.workers[0].answer(assignment, IDS)
        events = await call.end()
        assert isinstance(events[0], Accepted) and isinstance(events[-1], Summary)
        for told in (events[0], events[-1].usage):
            assert (told.prompt_tokens, told.truncated_tokens) == (len(kept), 3000 - len(kept))
        with pytest.raises(InvalidRequest, match="must be one of"):
            await Call(client, context_overflow="drop").end()


async def wait_state(worker: FakeWorker, request_id: str, state: State) -> bool:
    async with asyncio.timeout(60):
        while True:
            standing = await worker.records.standing(request_id)
            if standing is not None and standing.state is state:
                return True
            await asyncio.sleep(0.01)
