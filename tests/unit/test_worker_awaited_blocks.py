"""Awaited blocks: the queue's order holds, nobody waits for ever, and what is loaded is worth it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.engine import Engine, EngineSettings
from trireme.kvcache.block_identity import block_hashes
from trireme.kvcache.store_client import StoreClient
from trireme.models.null import NullModel
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters, TokenIds
from trireme.worker.awaited_prefixes import NEAR, PERIOD_S, AwaitedPrefixes
from trireme.worker.block_loads import BlockLoads
from trireme.worker.engine_messages import Awaited, Loaded, Offer
from trireme.worker.live_requests import LiveRequest
from trireme.worker.queue_hints import DESCRIBE_AGAIN_S, REPEAT_S, QueueHints
from trireme.worker.request_chains import RequestChains, prompt_hashes
from trireme.worker.request_table import new_choices
from trireme.worker.served_engine import ResidencyLog, ServedEngine
from trireme.worker.step_news import EngineFigures
from trireme.worker.variant_plan import VariantPlan
from trireme.worker.variants import LoadedVariant

BLOCK = 4


def admitted(name: str, prompt: list[int], *, arrival_s: float = 1.0, delivered: int = 0) -> AdmittedRequest:
    request = AdmittedRequest(
        request_id=name,
        tenant=f"tenant of {name}",
        kind=RequestKind.REQUEST_KIND_GENERATE,
        prompt_token_ids=prompt,
        sampling=SamplingParameters(temperature=0.0, max_tokens=3),
        kv_salt=name.encode(),
        attempt=1,
        admitted_unix_s=arrival_s,
    )
    request.delivered.append(TokenIds(ids=range(delivered)))
    return request


def live_of(request: AdmittedRequest, handle: int = 1) -> LiveRequest:
    live = LiveRequest(
        assignment=Assignment(request=request, variant="v"),
        entry_id=b"1",
        gateway_id="g",
        choices=new_choices(request.delivered, 1),
        work_tokens=1,
    )
    live.choices[0].handle = handle
    return live


@pytest.fixture
def served() -> ServedEngine:
    settings = EngineSettings(num_blocks=64, block_size=BLOCK, max_num_seqs=1, max_batch_tokens=8)
    residency = ResidencyLog()
    engine = Engine(NullModel(vocab_size=50), settings, residency, eos_token_ids=frozenset())
    return ServedEngine("v", engine, residency, patience_s=1.0)


def turns(served: ServedEngine, count: int) -> list[int]:
    """Handles in the order of their first tokens."""
    first: list[int] = []
    for _ in range(count):
        news = served.turn()
        for output in news.outputs if news is not None else ():
            if output.place == 0:
                first.append(output.handle)
    return first


def test_who_awaits_blocks_keeps_its_place_and_runs_when_they_are_decided(served: ServedEngine) -> None:
    served.add(admitted("a", [1] * 9), [(0, 1)], awaited_tokens=8)
    assert turns(served, 3) == [] and served.is_stuck
    assert served.awaited(now_s=0.0) is not None
    served.add(admitted("b", [2] * 9, arrival_s=1000.0), [(0, 2)])
    served.offer([1], ())
    assert turns(served, 12) == [1, 2]
    assert served.awaited(now_s=9.0) is None


def test_others_pass_who_awaits_and_a_missing_answer_costs_one_deadline(served: ServedEngine) -> None:
    served.add(admitted("a", [1] * 9), [(0, 1)], awaited_tokens=8)
    served.add(admitted("b", [2] * 9, arrival_s=1000.0), [(0, 2)])
    assert turns(served, 6) == [2]
    told = served.awaited(now_s=0.0)
    assert told is not None and [handle for handle, _ in told.order] == [1]
    assert served.awaited(now_s=0.9) is None
    assert turns(served, 3) == []
    told = served.awaited(now_s=1.1)
    assert told is not None and told.order == ()
    assert turns(served, 6) == [1]


def test_a_cancelled_sequence_awaits_nothing(served: ServedEngine) -> None:
    served.add(admitted("a", [1] * 9), [(0, 1)], awaited_tokens=8)
    served.cancel([1])
    released = []
    block = cast(Any, SimpleNamespace(let_go=lambda: released.append(1)))
    served.offer([1], [block])
    assert released == [1] and served.awaited(now_s=0.0) is None


def test_only_the_next_few_are_waited_for_and_far_changes_are_told_slowly() -> None:
    awaited = AwaitedPrefixes(patience_s=1.0)
    names = [f"s{n}" for n in range(NEAR + 4)]
    for name in names:
        awaited.add(name)
    order = [(name, 0.5) for name in names]
    assert awaited.look(order, now_s=0.0) == tuple(order)
    assert awaited.look(order, now_s=0.01) is None
    far_swapped = [*order[:NEAR], *reversed(order[NEAR:])]
    assert awaited.look(far_swapped, now_s=PERIOD_S / 2) is None
    assert awaited.look(far_swapped, now_s=PERIOD_S * 2) == tuple(far_swapped)
    near_swapped = [order[1], order[0], *order[2:]]
    assert awaited.look(near_swapped, now_s=PERIOD_S * 2) == tuple(near_swapped)
    assert sorted(awaited.overdue(now_s=1.0)) == sorted(names[:NEAR])
    assert awaited.overdue(now_s=9.0) == []


@given(
    prompt=st.integers(0, 40), delivered=st.integers(0, 20), answer=st.integers(0, 30), seed=st.integers(0, 9)
)
def test_a_requests_chain_is_that_of_all_its_computed_tokens(
    prompt: int, delivered: int, answer: int, seed: int
) -> None:
    rng = random.Random(seed)
    request = admitted("r", [rng.randrange(50) for _ in range(prompt)], delivered=delivered)
    live = live_of(request)
    chains = RequestChains()
    chains.follow(live, prompt_hashes(request, BLOCK), BLOCK)
    answered = [rng.randrange(50) for _ in range(answer)]
    whole = [*request.prompt_token_ids, *range(delivered), *answered]
    expected = block_hashes(whole[: max(prompt, len(whole) - 1)], BLOCK, b"r")
    for token in answered:
        live.choices[0].token_ids.append(token)
        chains.owner(b"?" * 16)  # looks at what has become full
    if expected and answer:
        assert chains.owner(expected[-1]) == "tenant of r"
    assert chains.end(live) == [list(expected)]
    assert chains.end(live) == []


class FakeStore:
    """Says what it is told to."""

    has_peers = False

    def __init__(self, available: int, in_dram: int) -> None:
        self.found = (available, in_dram)

    def match_local_tiers(self, namespace: str, hashes: list[bytes]) -> tuple[int, int]:
        return min(self.found[0], len(hashes)), min(self.found[1], len(hashes))


def loaded_variant(*, rate: float, link: float, block_bytes: int = 1000) -> LoadedVariant:
    plan = VariantPlan(
        variant="v",
        model="m",
        checkpoint=cast(Any, "c"),
        device="cpu",
        dtype="auto",
        kv_bytes=1,
        block_tokens=BLOCK,
        max_sequences=1,
        max_batch_tokens=8,
        policy="fcfs",
    )
    loaded = Loaded(
        kv_namespace="n", context_tokens=9, vocabulary_size=9, block_bytes=block_bytes, num_blocks=9
    )
    figures = EngineFigures(host_in_bytes_per_s=link, waiting=NEAR)  # far: nothing is begun at once
    return LoadedVariant(plan, loaded, figures, prefill_tokens_per_s=rate)


def awaited_tokens(
    *, available: int, in_dram: int | None = None, disk: float | None = None, **variant: float
) -> int:
    """Of a prompt of 101 tokens in 25 blocks."""
    store = FakeStore(available, available if in_dram is None else in_dram)
    sent: list[object] = []
    loads = BlockLoads(cast(StoreClient, store), cast(Any, None), sent.append, deadline_s=1.0)
    if disk is not None:
        loads.speeds.disk_bytes_per_s = disk
    live = live_of(admitted("r", [1] * 101))
    loaded = loaded_variant(**cast(Any, variant))
    tokens = loads.expect(live, loaded, prompt_hashes(live.assignment.request, BLOCK))
    assert not any(isinstance(each, Offer) for each in sent)
    return tokens


def test_a_stored_prefix_is_awaited_whole_where_loading_is_faster() -> None:
    assert awaited_tokens(available=20, rate=1000.0, link=1e9) == 80
    assert awaited_tokens(available=99, rate=1000.0, link=1e9) == 100, "the last token is never found"
    assert awaited_tokens(available=20, rate=0.0, link=0.0) == 80, "nothing is measured yet"


def test_what_computing_makes_as_fast_is_not_awaited() -> None:
    assert awaited_tokens(available=0, rate=1000.0, link=1e9) == 0
    assert awaited_tokens(available=20, rate=1e6, link=1e9) == 0, "asking takes longer than computing"
    assert awaited_tokens(available=20, rate=1000.0, link=1e9, block_bytes=0) == 0


def test_over_a_slow_link_or_disk_the_newest_history_is_computed() -> None:
    # 250 bytes a token: the link brings 1000 tokens/s, as many as are computed.
    half = awaited_tokens(available=25, rate=1000.0, link=250_000.0)
    assert 40 <= half <= 60 and half % BLOCK == 0
    disk = awaited_tokens(available=25, in_dram=10, disk=250_000.0, rate=1000.0, link=1e9)
    assert 40 <= disk < 100, "what is in DRAM is loaded, and part of what is on disk"
    assert awaited_tokens(available=25, in_dram=0, disk=1000.0, rate=1000.0, link=1e9) <= 4


def test_the_store_is_told_the_engines_order_and_each_chain_once() -> None:
    loaded = loaded_variant(rate=1000.0, link=1e9)
    variants = cast(Any, SimpleNamespace(find=lambda name: loaded))
    store = cast(StoreClient, FakeStore(25, 25))
    loads = BlockLoads(store, variants, lambda what: None, deadline_s=1.0)
    loads._begin = lambda expected: None  # type: ignore[method-assign]  # nobody's turn comes
    hints = QueueHints("w", loads, cast(Any, None), is_here=lambda live: live.request_id != "r0")
    requests = [admitted(f"r{number}", [1] * 101) for number in range(3)]
    for number, request in enumerate(requests):
        assert loads.expect(live_of(request, number), loaded, prompt_hashes(request, BLOCK))
    assert hints.next_hint(now_s=0.0) is None, "the engine has not said its order yet"
    loads.on_awaited(Awaited("v", ((2, 0.1), (0, 0.2), (7, 0.3), (1, float("inf")))))
    hint = hints.next_hint(now_s=0.0)
    assert hint is not None and list(hint.request_ids) == ["r2", "r0", "r1"]
    assert list(hint.start_in_s) == pytest.approx([0.1, 0.2, 3600.0])
    assert [each.block_hashes for each in hint.described] == [
        b"".join(prompt_hashes(requests[number], BLOCK)) for number in (2, 0, 1)
    ]
    assert hints.next_hint(now_s=0.1) is None
    loads.on_awaited(Awaited("v", ((1, 0.1), (0, 0.2), (2, 0.3))))
    hint = hints.next_hint(now_s=0.2)
    assert hint is not None and list(hint.request_ids) == ["r1", "r0", "r2"] and not hint.described
    loads.forget_ended(lambda live: live.request_id != "r0")
    hint = hints.next_hint(now_s=0.25)
    assert hint is not None and list(hint.request_ids) == ["r1", "r2"]
    assert hints.next_hint(now_s=0.25 + REPEAT_S) is not None, "a source that says nothing counts as dead"
    again = hints.next_hint(now_s=0.25 + REPEAT_S + DESCRIBE_AGAIN_S)
    assert again is not None and len(again.described) == 2
