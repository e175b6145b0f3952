"""From a worker's table to a gateway's, by updates and by columns: each token once and in order,
whatever becomes of the stream between them."""

from __future__ import annotations

from array import array
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trireme.gateway.live_request import Choice, LiveRequest
from trireme.gateway.metrics import Metrics
from trireme.gateway.request_table import RequestTable
from trireme.runtime.spans import NoSpans
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment
from trireme.wire.inference.v1.inference_pb2 import FINISH_REASON_LENGTH, SamplingParameters, TokenIds
from trireme.wire.worker.v1.worker_pb2 import TokenBatch
from trireme.worker import live_requests
from trireme.worker import request_table as worker_side
from trireme.worker.billing import Biller
from trireme.worker.step_news import Output, StepNews

NAMES = ("one", "two", "with logprobs")
CHOICES = {"one": 1, "two": 2, "with logprobs": 1}


class Silent:
    """For tokens that are never turned into text here."""

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def finish(self) -> str:
        return ""


METRICS = Metrics()


class Records:
    async def publish(self, event: object) -> None:
        """Nobody reads events here."""


class TokenStream(RuleBasedStateMachine):
    """One gateway, one worker (and, after a loss, the next), three requests."""

    @initialize()
    def begin(self) -> None:
        self.now_s = 0.0
        self.generation = 0
        self.gateway = RequestTable(
            self,  # type: ignore[arg-type]
            METRICS,
            on_lost=lambda worker_id, in_order: None,
            on_unknown=lambda live, worker_id: None,
        )
        self.lives: dict[str, LiveRequest] = {}
        self.made: dict[tuple[str, int], int] = {}
        """Tokens that the present attempt's engine has made, and earlier ones had delivered."""
        self.whole: dict[tuple[str, int], int] = {}
        """Tokens of answers that have ended: another attempt makes no more of them."""
        for name in NAMES:
            self.watch(name, attempt=1)
        self.start_worker()

    # What a gateway does with its links; a message that meets a broken stream is lost.

    def attach(self, worker_id: str, request_id: str) -> None:
        if worker_id == self.worker_id:
            self.worker.attach(request_id, "g")

    def stop(self, *_: object, **__: object) -> None:
        raise AssertionError("there are no stop strings here")

    def confirm(self, *_: object) -> None:
        raise AssertionError("somebody waits for every request")

    def watch(self, name: str, *, attempt: int) -> None:
        sampling = SamplingParameters(n=CHOICES[name])
        if "logprobs" in name:
            sampling.logprobs = 1
        admitted = AdmittedRequest(request_id=name, attempt=attempt, gateway_id="g", sampling=sampling)
        choices = [Choice(Silent()) for _ in range(CHOICES[name])]
        self.lives[name] = LiveRequest(admitted, choices, now_s=self.now_s)
        self.gateway.add(self.lives[name])

    def start_worker(self) -> None:
        self.generation += 1
        self.worker_id = f"w{self.generation}"
        self.worker = worker_side.RequestTable(
            worker_id=self.worker_id,
            records=Records(),  # type: ignore[arg-type]
            events=Records(),  # type: ignore[arg-type]
            biller=Biller("cpu", node="local"),
            spans=NoSpans(),
            cancel=lambda variant, handles: None,
        )
        self.worker._in_background = lambda work: work.close()  # type: ignore[method-assign]
        self.engine: dict[str, live_requests.LiveRequest] = {}
        for name in NAMES:
            live = self.lives[name]
            if live.ended:
                continue
            request = AdmittedRequest()
            request.CopyFrom(live.admitted)
            request.attempt = self.generation
            del request.delivered[:]
            request.delivered.extend(TokenIds(ids=choice.token_ids) for choice in live.choices)
            assignment = Assignment(request=request, variant="v", worker_id=self.worker_id)
            choices = worker_side.new_choices(request.delivered, CHOICES[name])
            self.engine[name] = live_requests.LiveRequest(assignment, b"1-0", "g", choices, 1)
            self.worker.add(self.engine[name])
            for number, delivered in enumerate(request.delivered):
                self.made[name, number] = len(delivered.ids)
        self.box = self.worker.outbox("g")

    def truth(self, name: str, number: int, count: int) -> list[int]:
        first = 1000 * NAMES.index(name) + 100_000 * number
        return list(range(first, first + count))

    @rule(
        chosen=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 1)), min_size=1, unique=True),
        is_first=st.booleans(),
    )
    def step(self, chosen: list[tuple[str, int]], is_first: bool) -> None:
        """The engine makes a token for some choices; now and then with something beside it."""
        tokens, outputs = array("q"), []
        for name, number in chosen:
            live = self.engine.get(name)
            if live is None or number >= CHOICES[name] or live.choices[number].finished is not None:
                continue
            place = self.made[name, number]
            if place == self.whole.get((name, number)):
                continue
            token_id = self.truth(name, number, place + 1)[-1]
            handle = live.choices[number].handle
            if "logprobs" in name:
                outputs.append(Output(handle, place, token_id, logprob=-0.5))
            elif is_first:
                outputs.append(Output(handle, place, token_id, cached_tokens=0))
            else:
                tokens.extend((handle, place, token_id))
            self.made[name, number] += 1
        self.worker.on_step(StepNews(variant="v", tokens=tokens, outputs=tuple(outputs)))

    @rule(name=st.sampled_from(NAMES), number=st.integers(0, 1))
    def end(self, name: str, number: int) -> None:
        live = self.engine.get(name)
        if live is None or number >= CHOICES[name] or live.choices[number].finished is not None:
            return
        self.whole[name, number] = self.made[name, number]
        end = Output(live.choices[number].handle, self.made[name, number], finish_reason="length")
        self.worker.on_step(StepNews(variant="v", outputs=(end,)))

    @rule()
    def deliver(self) -> None:
        batch = TokenBatch.FromString(self.box._batch().SerializeToString())
        self.now_s += 1.0
        self.gateway.on_batch(self.worker_id, batch)

    @rule(is_noticed=st.booleans())
    def lose_a_message(self, is_noticed: bool) -> None:
        """The stream breaks, and the gateway connects anew; or a bug drops what was sent."""
        self.box._batch()
        if is_noticed:
            self.worker.connected("g")

    @rule(name=st.sampled_from(NAMES))
    def client_resumes(self, name: str) -> None:
        """Its client left and came back: the gateway asks the worker for everything again."""
        if name not in self.engine:
            return  # it had ended before this worker began
        self.gateway.remove(self.lives[name])
        self.watch(name, attempt=self.generation)
        # As the gateway does from the request's record: the worker has only what came after.
        self.lives[name].preload(self.engine[name].assignment.request.delivered, self.now_s)
        self.attach(self.worker_id, name)

    @rule()
    def worker_dies(self) -> None:
        late = self.box._batch()
        worker_id = self.worker_id
        for name in NAMES:
            if not self.lives[name].ended:
                self.lives[name].enter_attempt(self.generation + 1, self.now_s)
        self.start_worker()
        self.gateway.on_batch(worker_id, late)

    @invariant()
    def what_arrived_is_the_beginning_of_the_answer(self) -> None:
        for name in NAMES:
            for number, choice in enumerate(self.lives[name].choices):
                have = choice.token_ids.tolist()
                assert have == self.truth(name, number, len(have))
                assert choice.texts == [f"{token_id} " for token_id in have]
                assert len(choice.logprobs) == (len(have) if "logprobs" in name else 0)

    @invariant()
    def only_lanes_of_living_requests_are_known(self) -> None:
        held = {id(live) for live in self.gateway}
        assert all(id(lane.live) in held for lanes in self.gateway._lanes.values() for lane in lanes.values())

    def teardown(self) -> None:
        """When the worker has told all, nothing is missing."""
        if not hasattr(self, "worker"):
            return
        for name in NAMES:
            for number in range(CHOICES[name]):
                self.end(name, number)
        self.worker.connected("g")
        for _ in range(4):
            self.deliver()
        for name, live in self.lives.items():
            if name not in self.engine:
                continue
            assert live.accounted
            for number, choice in enumerate(live.choices):
                assert len(choice.token_ids) == self.made[name, number]
                assert choice.reason == FINISH_REASON_LENGTH


TestTokenStream: Any = TokenStream.TestCase
TestTokenStream.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
