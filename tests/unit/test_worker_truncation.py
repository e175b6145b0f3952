"""What the gateway says of a cut, or of a public prefix, and what the worker's engine makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.test_gateway_truncation import CHECKPOINT, OLDEST, SIZE, public_model, submit
from trireme.engine import Engine, EngineSettings
from trireme.gateway.prefix_blocks import name_blocks
from trireme.gateway.submission import Submission
from trireme.loading.whole import load_model
from trireme.runtime.fleet import PublicPrefix
from trireme.runtime.spans import NoSpans
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, RequestKind
from trireme.worker.billing import Biller
from trireme.worker.live_requests import LiveRequest
from trireme.worker.request_chains import RequestChains, prompt_hashes
from trireme.worker.request_table import RequestTable, new_choices
from trireme.worker.sequence_requests import sequences_of
from trireme.worker.served_engine import ResidencyLog, ServedEngine

WINDOW = 256


class Nobody:
    """Takes what is told and does nothing with it."""

    async def publish(self, event: object) -> None:
        return None


class Worker:
    """One engine with the table that a worker keeps of it, without processes between them."""

    def __init__(self, window: int = WINDOW) -> None:
        residency = ResidencyLog()
        sizes = EngineSettings(
            num_blocks=8 * window // SIZE,
            block_size=SIZE,
            max_num_seqs=4,
            max_batch_tokens=256,
            max_model_len=window,
        )
        self.engine = Engine(load_model(CHECKPOINT), sizes, residency)
        self.served = ServedEngine("v", self.engine, residency)
        self.table = RequestTable(
            worker_id="w",
            records=None,  # type: ignore[arg-type]
            events=Nobody(),  # type: ignore[arg-type]
            biller=Biller("cpu", node="local"),
            spans=NoSpans(),
            cancel=lambda variant, handles: None,
        )
        self._count = 0

    def answer(
        self, submission: Submission, tenant: str = "t", delivered: list[int] | None = None, n: int = 1
    ) -> LiveRequest:
        """Serve one request to its end."""
        self._count += 1
        request = AdmittedRequest(
            request_id=f"r{self._count}",
            kind=RequestKind.REQUEST_KIND_GENERATE,
            prompt_token_ids=submission.prompt_token_ids,
            sampling=submission.sampling,
        )
        request.sampling.n = n
        request.sampling.ignore_eos = True
        request.sampling.seed = 11
        name_blocks(request, submission.model, submission.cut, fleet="fleet", tenant=tenant)
        if delivered is not None:
            request.delivered.add(ids=delivered)
        live = LiveRequest(
            assignment=Assignment(request=request, variant="v"),
            entry_id=request.request_id.encode(),
            gateway_id="g",
            choices=new_choices(request.delivered, n),
            work_tokens=0,
        )
        asyncio.run(self._serve(live))
        return live

    async def _serve(self, live: LiveRequest) -> None:
        request = live.assignment.request
        self.table.add(live)
        self.served.add(request, [(number, choice.handle) for number, choice in enumerate(live.choices)])
        while self.engine.has_work:
            news = self.served.turn()
            assert news is not None
            self.table.on_step(news)
        assert live.is_complete


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_conversation_is_cut_while_it_is_answered_and_found_by_its_next_turn(worker: Worker) -> None:
    prompt = [16 + index for index in range(100)]
    first = worker.answer(submit(OLDEST, prompt=prompt, max_tokens=300))
    (choice,) = first.choices
    assert len(choice.token_ids) == 300 and worker.engine.stats().context_cuts >= 2
    dropped = first.usage().truncated_tokens
    assert dropped % SIZE == 0 and 100 + 300 - dropped <= WINDOW

    whole = [*prompt, *choice.token_ids, *range(900, 920)]
    next_turn = submit(OLDEST, prompt=whole, max_tokens=20)
    assert next_turn.cut is not None
    second = worker.answer(next_turn)
    usage = second.usage()
    assert usage.truncated_tokens == next_turn.cut.plan.dropped >= dropped
    kept = len(whole) - usage.truncated_tokens
    assert usage.cached_prompt_tokens == (kept - 20 - 1) // SIZE * SIZE

    # Another worker, that knows nothing, goes on after a part of the answer.
    other = Worker()
    moved = other.answer(submit(OLDEST, prompt=prompt, max_tokens=300), delivered=choice.token_ids[:130])
    assert moved.choices[0].token_ids == choice.token_ids[130:]
    assert moved.usage().truncated_tokens == dropped


def test_each_choice_tells_what_it_dropped(worker: Worker) -> None:
    live = worker.answer(submit(OLDEST, prompt=[16 + index for index in range(100)], max_tokens=170), n=2)
    assert [choice.dropped_tokens for choice in live.choices] == [128, 128]
    assert live.usage().truncated_tokens == 256


def test_what_the_bus_says_of_a_cut_reaches_the_engine() -> None:
    submission = submit(OLDEST, prompt=list(range(300)))
    request = AdmittedRequest(kind=RequestKind.REQUEST_KIND_GENERATE, sampling=submission.sampling)
    request.prompt_token_ids.extend(submission.prompt_token_ids)
    name_blocks(request, submission.model, submission.cut, fleet="fleet", tenant="t")
    (made,) = sequences_of(request, [0])
    told: Any = request.truncation
    assert made.truncation is not None
    assert made.truncation.cuts == tuple(told.cuts) and made.truncation.head_tokens == SIZE
    assert b"".join(made.chain.extend((), made.prompt_token_ids, SIZE)) == request.prefix_hashes
    assert [b"".join(one.hashes) for one in made.truncation.supplies] == [
        one.block_hashes for one in told.supplies
    ]


def test_tenants_find_each_others_public_blocks_alone(worker: Worker) -> None:
    text = "def add(a, b):\n    return a + b\n" * 8
    model = public_model(PublicPrefix(text=text))
    declared = list(model.public_prefixes[0])
    shared = len(declared) // SIZE * SIZE
    assert shared >= 2 * SIZE
    prompt = declared + [9] * 60
    found: dict[str, list[int]] = {}
    for tenant in ("a", "b", "b"):
        live = worker.answer(submit(OLDEST, prompt=prompt, max_tokens=3, model=model), tenant)
        found.setdefault(tenant, []).append(live.usage().cached_prompt_tokens)
    everything = (len(prompt) - 1) // SIZE * SIZE
    assert found == {"a": [0], "b": [shared, everything]} and shared < everything


def test_the_worker_names_an_answers_blocks_behind_a_public_prompt_as_the_engine_does(worker: Worker) -> None:
    model = public_model(PublicPrefix(text="def add(a, b):\n    return a + b\n" * 8))
    declared = list(model.public_prefixes[0])
    prompt = declared[: len(declared) // SIZE * SIZE]
    live = worker.answer(submit(OLDEST, prompt=prompt, max_tokens=50, model=model))
    chains = RequestChains()
    chains.follow(live, prompt_hashes(live.assignment.request, SIZE), SIZE)
    (names,) = chains.end(live)
    assert len(names) == (len(prompt) + 49) // SIZE > len(prompt) // SIZE
    assert all(worker.engine.export_block(name) is not None for name in names)
