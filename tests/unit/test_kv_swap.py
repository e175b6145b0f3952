"""ENST against its definition, victims in its order, the reserve, and the one next-use key."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.policies import next_use
from trireme.policies.iteration import Budget, Job, Location, SequenceView
from trireme.policies.iteration_profile import IterationProfile, PrefillPoint
from trireme.policies.kv_swap import BurstReserve, Fit, LevelLoad, Room, by_enst_descending
from trireme.policies.mlfq import MlfqScheduler, MlfqSettings
from trireme.policies.run_queue import Key

QUANTA = (1.0, 2.0, 4.0, 8.0)


def load(levels: Iterable[int]) -> LevelLoad:
    found = LevelLoad(QUANTA)
    for level in levels:
        found.enter(level)
    return found


def execute_by_definition(level: int, others: Iterable[int], batch: int) -> float:
    return sum(sum(QUANTA[other - 1 : level - 1]) for other in others if other < level) / batch


def test_the_golden_vector() -> None:
    assert load([1, 1, 2, 3]).execute_s(3, 2) == 4.0


@given(st.lists(st.integers(1, 4)), st.integers(1, 8))
def test_sums_per_level_are_the_definition_and_rise_with_the_level(levels: list[int], batch: int) -> None:
    found = load(levels)
    times = [found.execute_s(level, batch) for level in (1, 2, 3, 4)]
    assert times == pytest.approx([execute_by_definition(level, levels, batch) for level in (1, 2, 3, 4)])
    assert times == sorted(times) and times[0] == 0.0


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1)), min_size=1), st.integers(0, 5))
def test_the_refined_time_subtracts_what_was_burnt_and_adds_those_ahead(
    jobs: list[tuple[int, float]], ahead: int
) -> None:
    found = LevelLoad(QUANTA)
    for level, used_s in jobs:
        found.enter(level)
        found.charge(level, used_s)
    for level in (1, 2, 3, 4):
        burnt_s = sum(used_s for other, used_s in jobs if other < level)
        expected_s = execute_by_definition(level, [other for other, _ in jobs], 1) - burnt_s
        expected_s += ahead * QUANTA[level - 1]
        assert found.execute_s_v2(level, 1, ahead) == pytest.approx(max(0.0, expected_s))
    level, used_s = jobs[0]
    found.leave(level, used_s)
    rest = [other for other, _ in jobs[1:]]
    assert found.execute_s(4, 1) == pytest.approx(execute_by_definition(4, rest, 1))


NAMES = [f"{number:02}" for number in range(12)]


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 20)), max_size=12), st.data())
def test_victims_come_in_the_order_of_enst(jobs: list[tuple[int, float]], data: st.DataObject) -> None:
    keys: list[Key] = sorted((level, ticket, NAMES[ticket]) for ticket, (level, _) in enumerate(jobs))
    found = load([level for level, _ in jobs])

    def execute_s(key: Key) -> float:
        return found.execute_s(int(key[0]), 2)

    promotes_s = {key: promote_s for key in keys for _, promote_s in [jobs[key[1]]]}
    in_line = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    soon = [(promotes_s[key], key) for key in in_line if promotes_s[key] < execute_s(key)]
    enst_s = {key: execute_s(key) for key in keys} | {key: promote_s for promote_s, key in soon}
    order = list(by_enst_descending(reversed(keys), soon, execute_s))
    assert sorted(order) == keys
    times = [enst_s[key] for key in order]
    assert times == sorted(times, reverse=True)


def room(
    views: dict[str, SequenceView],
    *,
    free: int = 0,
    draining: int = 0,
    host: int = 0,
    placed: set[str] | None = None,
    spared: str | None = None,
) -> Room:
    """Victims in the reversed order of the dictionary."""
    budget = Budget(
        token_budget=9, max_sequences=9, free_blocks=free, draining_blocks=draining, host_free_blocks=host
    )
    keys = [(1, number, name) for number, name in enumerate(views)]
    return Room(budget, views.__getitem__, reversed(keys), (set(), placed or set()), spared)


def held(blocks: int, location: Location = Location.DEVICE) -> SequenceView:
    return SequenceView(1, 0, blocks, location)


FIRST = (0, 0, "first")


def test_blocks_come_from_the_free_then_the_draining_then_the_last_in_order() -> None:
    made = room({"a": held(3), "b": held(3)}, free=2, draining=2, host=9)
    assert made.make(FIRST, 2) is Fit.NOW and not made.swap_out
    assert made.make(FIRST, 2) is Fit.SOON and not made.swap_out
    assert made.make(FIRST, 2) is Fit.SOON and list(made.swap_out) == ["b"]
    assert "first needs 2 blocks" in made.swap_out["b"]
    assert (made.now, made.soon, made.host) == (0, 1, 6)


def test_what_cannot_be_had_moves_nobody() -> None:
    made = room({"a": held(3), "b": held(3)}, free=2, host=9)
    assert made.make(FIRST, 9) is Fit.NEVER
    assert not made.swap_out and made.now == 2 and made.host == 9
    assert made.make(FIRST, 8) is Fit.SOON
    assert list(made.swap_out) == ["b", "a"]


def test_nobody_that_stands_before_or_runs_or_moves_is_a_victim() -> None:
    views = {"a": held(3), "b": held(3), "c": held(3, Location.MOVING), "d": held(0), "e": held(3)}
    made = room(views, host=99, placed={"e"})
    assert made.make((1, 0, "a"), 4) is Fit.NEVER
    assert made.make((1, 0, "a"), 3) is Fit.SOON
    assert list(made.swap_out) == ["b"]


def test_kv_is_dropped_only_where_the_host_is_full_and_the_taker_must_go_on() -> None:
    made = room({"a": held(3), "b": held(5)}, host=4)
    assert made.make(FIRST, 4) is Fit.NEVER and not made.evicted
    assert made.make(FIRST, 1) is Fit.SOON and list(made.swap_out) == ["a"]
    made = room({"a": held(3), "b": held(5)}, host=4)
    assert made.make(FIRST, 4, may_evict=True) is Fit.NOW
    assert list(made.evicted) == ["b"] and "the host has room for 4" in made.evicted["b"]


def test_nobody_is_dropped_twice_in_a_row_while_there_is_another() -> None:
    made = room({"a": held(3), "b": held(3)}, spared="b")
    assert made.make(FIRST, 3, may_evict=True) is Fit.NOW and list(made.evicted) == ["a"]
    assert made.make(FIRST, 3, may_evict=True) is Fit.NOW and list(made.evicted) == ["a", "b"]


def test_the_reserve_is_topped_up_by_copies_alone() -> None:
    made = room({"a": held(3), "b": held(5), "c": held(4)}, free=2, host=7)
    made.top_up(20)
    assert list(made.swap_out) == ["c", "a"] and not made.evicted
    made = room({"a": held(3)}, free=9, host=7)
    made.top_up(9)
    assert not made.swap_out


def test_the_reserve_follows_bursts_and_forgets_them() -> None:
    burst = BurstReserve(window=32, refresh=4)
    assert burst.blocks(8) == 8
    for _ in range(16):
        burst.observe(0)
        burst.observe(12)
    assert burst.blocks(8) == 20
    burst.pass_by(1000)
    assert burst.blocks(8) == 8


def waiting(levels: list[int], **knobs: object) -> MlfqScheduler:
    """Jobs named by their place, at these levels of 1, 2, 4, 8 s."""
    profile = IterationProfile(tuple(PrefillPoint(n, 0, float(n)) for n in (1, 2, 4, 8)), ())
    scheduler = MlfqScheduler(profile, MlfqSettings(quantum_s=1.0, levels=4, **knobs))  # type: ignore[arg-type]
    for number, level in enumerate(levels):
        job = Job(sequence_id=f"{number}", arrival_s=0.0, new_tokens=2 ** (level - 1))
        scheduler.add(job, now_s=0.0)
        assert scheduler.level_of(f"{number}") == level
    return scheduler


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.booleans())
def test_next_use_rises_in_the_order_of_the_queue(levels: list[int], is_refined: bool) -> None:
    scheduler = waiting(levels, alpha_s=math.inf, enst_v2=is_refined)
    times = [scheduler.next_use_s(name, now_s=0.0) for name in scheduler.order()]
    assert times[0] == 0.0 and times == sorted(times)
    if is_refined:
        expected_s = [0.0]
        for name in list(scheduler.order())[:-1]:
            expected_s.append(expected_s[-1] + QUANTA[scheduler.level_of(name) - 1])
        same_level = [
            (time_s, expected)
            for name, time_s, expected in zip(scheduler.order(), times, expected_s, strict=True)
            if scheduler.level_of(name) == 1
        ]
        assert all(time_s == expected for time_s, expected in same_level)


def test_keys_of_next_use_order_what_all_kv_belongs_to() -> None:
    started = next_use.of_sequence(4.0, has_started=True)
    queued = next_use.of_sequence(4.0, has_started=False)
    soon = next_use.of_idle_session(10.0, predicted_gap_s=12.0)
    overdue = next_use.of_idle_session(30.0, predicted_gap_s=12.0)
    unknown = next_use.of_idle_session(5.0)
    longer_unknown = next_use.of_idle_session(50.0)
    assert sorted([longer_unknown, unknown, overdue, soon, queued, started]) == [
        soon,
        started,
        queued,
        overdue,
        unknown,
        longer_unknown,
    ]
    assert next_use.of_sequence(math.nan, has_started=True).seconds == 0.0
    assert next_use.of_sequence(-1.0, has_started=True).seconds == 0.0
    assert next_use.of_idle_session(1.0, predicted_gap_s=math.nan).seconds == math.inf
