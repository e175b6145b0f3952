"""The engine under each iteration policy: whoever stops goes on with the same tokens, and nothing leaks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.engine_support import (
    answer,
    greedy,
    outputs_of,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from tests.unit.kv_movement_support import Releases, conserves, library_of, shaken, sound
from trireme.engine import Engine, FinishReason, Link, Mode, SequenceRequest
from trireme.engine.batch import Part
from trireme.engine.outputs import EventKind
from trireme.engine.tally import StepReport
from trireme.errors import InvalidConfiguration
from trireme.kvcache.block_identity import block_hashes
from trireme.models.model import Model
from trireme.models.null import NullModel
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.schedulers import LIVE_POLICIES

SALT = b"tenant"
TINY = MlfqSettings(quantum_s=1e-3, levels=12, alpha_s=0.02, promote_period=5)
"""Demoted after two decode steps, promoted after twenty."""


pytestmark = pytest.mark.usefixtures("one_thread")


Ask = Callable[[SequenceRequest], list[int]]


@pytest.fixture(scope="module")
def alone(model: Model) -> Ask:
    known: dict[tuple[int, ...], list[int]] = {}

    def ask(wanted: SequenceRequest) -> list[int]:
        key = (wanted.sampling.max_tokens, *wanted.prompt_token_ids)
        if key not in known:
            known[key] = answer(Engine(model, settings()), wanted.prompt_token_ids, wanted.sampling)
        return known[key]

    return ask


def engine_of(model: Model, policy: str, *, link: Link | None = None, **changes: Any) -> Engine:
    """An engine on whose clock a step takes a millisecond per token of a prompt, and one for all others."""
    now_s = 0.0
    engine = Engine(
        model,
        settings(policy=policy, **{"mlfq": TINY, "block_size": 4, "max_batch_tokens": 16, **changes}),
        link=link,
        clock=lambda: now_s,
    )
    schedule = engine._roster.schedule

    def timed(report: StepReport, *, now_s: float) -> list[Part]:
        parts = schedule(report, now_s=now_s)
        advance(sum(count for _, count in parts if count > 1) + any(count == 1 for _, count in parts))
        return parts

    def advance(milliseconds: int) -> None:
        nonlocal now_s
        now_s += 1e-3 * milliseconds

    engine._roster.schedule = timed  # type: ignore[method-assign]
    return engine


def assert_all_is_free(engine: Engine) -> None:
    cache = engine._cache
    while cache.copies.num_open:
        cache.copies.wait(0.1)
        cache.copies.poll()
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_draining, stats.host_blocks_used) == (0, 0, 0)
    assert (stats.waiting, stats.running, stats.paused, stats.swapped) == (0, 0, 0, 0)
    assert not cache._pending
    assert next(iter(engine._roster._scheduler.order()), None) is None


@pytest.mark.parametrize("policy", LIVE_POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_tokens_do_not_depend_on_who_stops_when(model: Model, alone: Ask, policy: str, seed: int) -> None:
    chance = random.Random(seed)
    rates = [None, 3e5, 1e6, 1e7]
    # Fourteen sequences of at most 59 tokens need no more than 210 blocks.
    host_blocks = [0, 6, 20, 210][seed % 4]
    engine = engine_of(
        model,
        policy,
        num_blocks=20,
        host_blocks=host_blocks,
        max_num_seqs=4,
        prefix_cache=bool(seed % 3),
        link=Link(in_bytes_per_s=chance.choice(rates), out_bytes_per_s=chance.choice(rates)),
    )
    elder = Engine(model, settings(block_size=4))
    shared = prompt_of(seed, 14)
    releases = Releases()
    wanted: dict[str, SequenceRequest] = {}
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    cancelled: set[str] = set()
    for _ in range(20_000):
        if len(wanted) < 14 and chance.random() < 0.3:
            name = f"s{len(wanted)}"
            prompt = shared[: chance.randint(0, 14)] + prompt_of(chance.randint(0, 5), chance.randint(1, 20))
            wanted[name] = request(
                name,
                prompt,
                greedy(chance.choice([2, 25, 45])),
                salt=SALT,
                priority=chance.randint(0, 2),
                urgency=chance.randint(-1, 1),
            )
            stored = []
            if chance.random() < 0.3:
                answer(elder, prompt, greedy(1), salt=SALT)
                library = library_of(elder, block_hashes(prompt, elder.settings.block_size, SALT))
                stored = list(shaken(library, releases, chance))
            engine.add(wanted[name], stored=stored)
        elif wanted and chance.random() < 0.01:
            name = chance.choice(sorted(wanted))
            assert engine.cancel(name) == (name not in ended | cancelled)
            if name not in ended:
                cancelled.add(name)
        for output in engine.step().outputs:
            assert output.sequence_id not in cancelled
            assert output.index == len(tokens.setdefault(output.sequence_id, []))
            assert output.token_id is not None
            tokens[output.sequence_id].append(output.token_id)
            if output.finish_reason is not None:
                ended.add(output.sequence_id)
        cache = engine._cache
        assert conserves(cache.pool) and (cache.host is None or conserves(cache.host.pool))
        if len(wanted) == 14 and not engine.has_work:
            break
    else:
        raise AssertionError("the engine makes no progress")
    for name, got in tokens.items():
        expected = alone(wanted[name])
        assert got == (expected if name in ended else expected[: len(got)])
    assert ended | cancelled == set(wanted)
    stats = engine.stats()
    assert stats.lost_sequences == 0
    assert stats.preemptions > 0
    if host_blocks == 210:
        assert (stats.recomputed_tokens, stats.evictions) == (0, 0)
        assert stats.swapped_out_blocks > 0
    if policy == "mlfq":
        assert stats.demotions > 0
    assert_all_is_free(engine)
    assert set(releases.counts) <= {1}
    engine.close()


@pytest.mark.parametrize("policy", LIVE_POLICIES)
def test_copies_that_fail_cost_time_and_no_token(
    model: Model, alone: Ask, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, policy, num_blocks=20, host_blocks=100, max_num_seqs=6)
    for owner, name in (
        (engine._cache.memory, "gather"),
        (engine._cache.memory, "scatter"),
        (engine._cache.memory, "scatter_layer"),
    ):
        monkeypatch.setattr(owner, name, fragile(getattr(owner, name)))
    elder = Engine(model, settings(block_size=4))
    releases = Releases()
    wanted = [request(f"s{n}", prompt_of(n, 10 + n), greedy(30), salt=SALT, priority=n % 3) for n in range(8)]
    for one in wanted:
        answer(elder, one.prompt_token_ids, greedy(1), salt=SALT)
        library = library_of(elder, block_hashes(one.prompt_token_ids, elder.settings.block_size, SALT))
        engine.add(one, stored=sound(library, releases))
    assert tokens_of(run(engine, max_steps=20_000)) == {one.sequence_id: alone(one) for one in wanted}
    stats = engine.stats()
    assert stats.lost_sequences > 0
    assert stats.recomputed_tokens > 0
    assert_all_is_free(engine)
    assert set(releases.counts) == {1}


def fragile(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def sometimes(*args: Any) -> Any:
        if next(calls) % 4 == 0:
            raise OSError("a copy engine's bad day")
        return function(*args)

    return sometimes


def test_scores_and_vectors_survive_being_swapped(model: Model) -> None:
    asked = [
        request("vector", prompt_of(1, 40), greedy(1), mode=Mode.EMBED),
        request("scores", prompt_of(2, 9), greedy(1), mode=Mode.SCORE, score_continuations=(range(1, 60),)),
    ]

    def answers(engine: Engine) -> tuple[list[float], list[float]]:
        vector: list[float] = []
        scores: list[float] = []
        for one in asked:
            engine.add(one)
        for number in itertools.count():
            if not engine.has_work:
                return vector, scores
            if number < 20:
                engine.add(request(f"short{number}", prompt_of(number, 6), greedy(2)))
            result = engine.step()
            vector += [x for output in result.embeddings for x in output.vector]
            scores += [x for output in result.scores for x in output.logprobs]
        raise AssertionError

    expected = answers(Engine(model, settings(block_size=4)))
    engine = engine_of(model, "mlfq", num_blocks=20, host_blocks=100, max_batch_tokens=8)
    warm_up(engine)
    got = answers(engine)
    assert engine.stats().preemptions > 0 and engine.stats().recomputed_tokens == 0
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    assert got[1] == pytest.approx(expected[1], rel=1e-5)


def test_a_short_prompt_waits_for_at_most_one_chunk_of_a_long_one(model: Model) -> None:
    engine = engine_of(model, "mlfq", max_num_seqs=4)
    warm_up(engine)
    for begun in range(1, 12, 3):
        engine.add(request("long", prompt_of(1, 300), greedy(2), salt=bytes([begun])))
        for _ in range(begun):
            assert not outputs_of([engine.step()])
        engine.add(request("short", prompt_of(2, 12), greedy(2), salt=bytes([begun])))
        assert "short" in outputs_of([engine.step()])
        results = run(engine)
        assert "long" in outputs_of(results)
    first = engine_of(model, "fcfs", max_num_seqs=4)
    first.add(request("long", prompt_of(1, 300), greedy(2)))
    first.step()
    first.add(request("short", prompt_of(2, 12), greedy(2)))
    names = [name for result in run(first) for name in outputs_of([result])]
    assert names.index("long") < names.index("short")


def warm_up(engine: Engine) -> None:
    """Steps enough to learn a profile."""
    engine.add(request("warm", prompt_of(9, 40), greedy(20), salt=b"warm"))
    engine.add(request("warmer", prompt_of(9, 20), greedy(20), salt=b"warm"))
    run(engine)


def test_a_long_answer_makes_way_for_short_ones_and_every_stop_is_told(model: Model, alone: Ask) -> None:
    engine = engine_of(model, "mlfq", num_blocks=14, host_blocks=60, max_num_seqs=2)
    long = [request(f"long{n}", prompt_of(n, 8), greedy(40)) for n in range(2)]
    for one in long:
        engine.add(one)
    results = [engine.step() for _ in range(12)]
    short = [request(f"short{n}", prompt_of(5 + n, 6), greedy(3)) for n in range(4)]
    for one in short:
        engine.add(one)
    while not any(o.finish_reason for r in results[12:] for o in r.outputs):
        results.append(engine.step())
    assert {o.sequence_id for o in results[-1].outputs if o.finish_reason} <= {
        one.sequence_id for one in short
    }
    results += run(engine)
    assert tokens_of(results) == {one.sequence_id: alone(one) for one in (*long, *short)}
    told = [event for result in results for event in result.events]
    kinds = {event.kind for event in told}
    assert {EventKind.PAUSED, EventKind.DEMOTED} <= kinds
    assert {event.sequence_id for event in told if event.kind is EventKind.PAUSED} & {"long0", "long1"}
    assert all(event.reason and "\n" not in event.reason for event in told)
    stats = engine.stats()
    assert stats.demotions == sum(event.kind is EventKind.DEMOTED for event in told)
    assert stats.promotions == sum(event.kind is EventKind.PROMOTED for event in told)
    assert stats.recomputed_tokens == 0


@pytest.mark.parametrize("urgency, is_first", [(3, True), (0, False)])
def test_an_urgent_long_prompt_joins_above_its_length(model: Model, urgency: int, is_first: bool) -> None:
    engine = engine_of(model, "mlfq", max_num_seqs=1, mlfq=replace(TINY, alpha_s=math.inf))
    warm_up(engine)
    engine.add(request("long", prompt_of(1, 100), greedy(1), urgency=urgency))
    engine.add(request("short", prompt_of(2, 30), greedy(1)))
    order = [name for result in run(engine) for name in outputs_of([result])]
    assert order == (["long", "short"] if is_first else ["short", "long"])


@pytest.mark.parametrize("policy", LIVE_POLICIES)
def test_a_step_looks_at_few_of_those_that_wait(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(NullModel(vocab_size=50), settings(policy=policy, max_num_seqs=8, num_blocks=64))
    looks = 0
    view = engine._roster._view

    def counting(sequence_id: str) -> Any:
        nonlocal looks
        looks += 1
        return view(sequence_id)

    monkeypatch.setattr(engine._roster, "_view", counting)
    for number in range(20_000):
        engine.add(request(f"q{number:05d}", (number % 50, 7), greedy(3)))
    engine.step()
    for number in range(19_900):
        assert engine.cancel(f"q{19_999 - number:05d}")
        if number % 2000 == 0:
            looks = 0
            engine.step()
            assert looks <= 64
    run(engine)
    assert_all_is_free(engine)


def test_no_such_policy_and_no_such_knob() -> None:
    with pytest.raises(InvalidConfiguration, match="mlfq"):
        settings(policy="lottery")
    with pytest.raises(InvalidConfiguration, match="levels"):
        MlfqSettings(levels=0)


def test_a_sequence_that_fails_while_others_wait_ends_alone(model: Model, alone: Ask) -> None:
    engine = engine_of(model, "mlfq", num_blocks=20, host_blocks=60, max_num_seqs=2)
    wanted = [request(f"s{n}", prompt_of(n, 10), greedy(20)) for n in range(5)]
    for one in wanted:
        engine.add(one)
    results = [engine.step() for _ in range(15)]
    victim = next(iter(engine._roster._paused | engine._roster._swapped))
    engine._fail(engine._requests[victim][0], ValueError("a fault"), StepReport([]))
    results += run(engine)
    for one in wanted:
        if one.sequence_id != victim:
            assert tokens_of(results)[one.sequence_id] == alone(one)
    assert not any(o.finish_reason is FinishReason.ERROR for r in results for o in r.outputs)
    assert_all_is_free(engine)
