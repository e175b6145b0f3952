"""Iteration scheduling: budgets hold, urgent work goes first, nobody that fits is starved."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.iteration_snapshot import (
    IterationPolicy,
    IterationState,
    RunningSequence,
    WaitingSequence,
    fcfs_order,
    priority_order,
    schedule_fcfs,
    schedule_priority,
)

BOTH = pytest.mark.parametrize("schedule", [schedule_fcfs, schedule_priority])


def waiting(
    name: str,
    arrival_s: float = 0.0,
    *,
    tokens: int = 10,
    blocks: int = 1,
    priority: int = 0,
    passed: int = 0,
    next_block: bytes | None = None,
    pending: bool = False,
) -> WaitingSequence:
    return WaitingSequence(name, arrival_s, priority, tokens, blocks, passed, next_block, pending)


def running(
    name: str, arrival_s: float = 0.0, *, tokens: int = 1, blocks: int = 0, held: int = 4, priority: int = 0
) -> RunningSequence:
    return RunningSequence(name, arrival_s, priority, tokens, blocks, held)


def state(
    waiting: Sequence[WaitingSequence] = (),
    running: Sequence[RunningSequence] = (),
    *,
    tokens: int = 32,
    slots: int = 8,
    free: int = 100,
    watermark: int = 0,
    max_passes: int = 3,
) -> IterationState:
    return IterationState(
        waiting=waiting,
        running=running,
        token_budget=tokens,
        max_sequences=slots,
        free_blocks=free,
        watermark_blocks=watermark,
        max_passes=max_passes,
    )


@BOTH
def test_decoding_comes_first_and_prefill_takes_the_rest_in_chunks(schedule: IterationPolicy) -> None:
    decision = schedule(
        state(
            [waiting("new", 3.0, tokens=50)],
            [running("prefill", 1.0, tokens=20), running("a", 2.0), running("b", 0.0)],
            tokens=30,
        )
    )
    assert dict(decision.runs) == {"b": 1, "a": 1, "prefill": 20, "new": 8}
    assert decision.admitted == {"new"}


@BOTH
def test_a_block_is_taken_from_the_latest(schedule: IterationPolicy) -> None:
    decision = schedule(
        state(
            [waiting("new", 0.5)],
            [running("old", 0.0, blocks=1), running("mid", 1.0), running("late", 2.0)],
            free=0,
        )
    )
    assert [preempted.sequence_id for preempted in decision.preempted] == ["late"]
    assert dict(decision.runs) == {"old": 1, "mid": 1}
    assert "old needs 1 blocks" in decision.preempted[0].reason


@BOTH
def test_a_sequence_that_is_the_latest_preempts_itself(schedule: IterationPolicy) -> None:
    decision = schedule(state([], [running("old"), running("late", 2.0, blocks=1)], free=0))
    assert [preempted.sequence_id for preempted in decision.preempted] == ["late"]
    assert dict(decision.runs) == {"old": 1}


@BOTH
def test_a_small_sequence_passes_a_large_one_but_not_for_ever(schedule: IterationPolicy) -> None:
    queue = [waiting("large", 0.0, blocks=50), waiting("small", 1.0, blocks=2)]
    first = schedule(state(queue, [running("x")], free=10))
    assert first.admitted == {"small"}
    assert first.passed == ("large",)
    queue[0] = queue[0]._replace(times_passed=3)
    later = schedule(state(queue, [running("x")], free=10))
    assert later.admitted == set()
    assert later.passed == ()
    at_last = schedule(state(queue, [running("x")], free=60))
    assert at_last.admitted == {"large", "small"}


@BOTH
def test_one_that_was_passed_by_nobody_does_not_count_it(schedule: IterationPolicy) -> None:
    decision = schedule(state([waiting("large", blocks=50)], [running("x")], free=10))
    assert decision.passed == ()


@BOTH
def test_the_watermark_is_left_free_unless_nothing_runs(schedule: IterationPolicy) -> None:
    queue = [waiting("new", blocks=9)]
    assert not schedule(state(queue, [running("x")], free=10, watermark=2)).admitted
    assert schedule(state(queue, [], free=10, watermark=2)).admitted == {"new"}


@BOTH
def test_a_shared_block_is_computed_once(schedule: IterationPolicy) -> None:
    queue = [
        waiting("first", 0.0, next_block=b"same"),
        waiting("second", 1.0, next_block=b"same"),
        waiting("third", 2.0, next_block=b"other", pending=True),
        waiting("fourth", 3.0, next_block=b"own"),
    ]
    decision = schedule(state(queue))
    assert decision.admitted == {"first", "fourth"}
    assert decision.passed == ()


def test_priority_goes_before_arrival_under_priority_only() -> None:
    queue = [waiting("early", 0.0), waiting("urgent", 1.0, priority=5)]
    assert schedule_fcfs(state(queue, slots=1)).admitted == {"early"}
    assert schedule_priority(state(queue, slots=1)).admitted == {"urgent"}


def test_the_urgent_take_over_slots_and_blocks_from_as_few_as_needed() -> None:
    others = [running("a", 0.0), running("b", 1.0), running("c", 2.0, priority=9)]
    urgent = [waiting("urgent", 5.0, priority=5, blocks=3)]
    by_slot = schedule_priority(state(urgent, others, slots=3))
    assert [preempted.sequence_id for preempted in by_slot.preempted] == ["b"]
    assert by_slot.admitted == {"urgent"}
    assert dict(by_slot.runs) == {"c": 1, "a": 1, "urgent": 10}
    by_blocks = schedule_priority(state([urgent[0]._replace(num_blocks=7)], others, free=0))
    assert {preempted.sequence_id for preempted in by_blocks.preempted} == {"a", "b"}
    hopeless = schedule_priority(state([urgent[0]._replace(num_blocks=9)], others, free=0))
    assert hopeless.preempted == ()
    assert not schedule_fcfs(state(urgent, others, slots=3)).preempted


_ARRIVALS = st.floats(0, 10, allow_nan=False)


@st.composite
def states(draw: st.DrawFn) -> IterationState:
    runners = [
        running(
            f"r{index}",
            draw(_ARRIVALS),
            tokens=draw(st.sampled_from([1, 1, 1, 5, 40])),
            blocks=draw(st.integers(0, 1)),
            held=draw(st.integers(1, 6)),
            priority=draw(st.integers(-1, 1)),
        )
        for index in range(draw(st.integers(0, 6)))
    ]
    waiters = [
        waiting(
            f"w{index}",
            draw(_ARRIVALS),
            tokens=draw(st.integers(1, 60)),
            blocks=draw(st.integers(0, 12)),
            priority=draw(st.integers(-1, 1)),
            passed=draw(st.integers(0, 4)),
            next_block=draw(st.sampled_from([None, b"a", b"b"])),
            pending=draw(st.booleans()),
        )
        for index in range(draw(st.integers(0, 6)))
    ]
    return state(
        waiters,
        runners,
        tokens=draw(st.integers(8, 64)),
        slots=draw(st.integers(max(1, len(runners)), 8)),
        free=draw(st.integers(0, 20)),
        watermark=draw(st.integers(0, 3)),
    )


@BOTH
@given(given_state=states())
@settings(max_examples=200, deadline=None)
def test_every_decision_keeps_its_budgets(schedule: IterationPolicy, given_state: IterationState) -> None:
    decision = schedule(given_state)
    order = fcfs_order if schedule is schedule_fcfs else priority_order
    runners = {sequence.sequence_id: sequence for sequence in given_state.running}
    waiters = {sequence.sequence_id: sequence for sequence in given_state.waiting}
    gone = {preempted.sequence_id for preempted in decision.preempted}
    runs = dict(decision.runs)

    assert sum(runs.values()) <= given_state.token_budget
    assert all(count >= 1 for count in runs.values())
    assert len(runners) - len(gone) + len(decision.admitted) <= given_state.max_sequences
    assert not gone & runs.keys()
    assert decision.admitted == runs.keys() & waiters.keys()
    taken = sum((runners | waiters)[name].num_blocks for name in runs)
    assert taken <= given_state.free_blocks + sum(runners[name].held_blocks for name in gone)
    for name, count in runs.items():
        assert count <= (runners | waiters)[name].num_tokens
    for name in decision.passed:
        assert name in waiters and name not in decision.admitted and decision.admitted
    if given_state.running:
        most_urgent = min(given_state.running, key=order)
        alone_and_stuck = len(runners) == 1 and most_urgent.num_blocks > given_state.free_blocks
        taken_over = any(order(waiters[name]) < order(most_urgent) for name in decision.admitted)
        assert most_urgent.sequence_id not in gone or alone_and_stuck or taken_over
    for name in gone:
        stayed = [order(runners[other]) for other in runners if other not in gone]
        assert all(other < order(runners[name]) for other in stayed)
    assert schedule(given_state) == decision
