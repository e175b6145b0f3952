"""A request's phases: they meet, sum to its time, and keep their order whatever clocks say."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.gateway.timelines import PHASES, Timeline, Timelines, cut_phases

TIMES = st.floats(min_value=990.0, max_value=1010.0)


def names(*ends: float, end: float = 10.0) -> list[tuple[str, float]]:
    return [(phase.name, phase.seconds) for phase in cut_phases(0.0, ends, end)]


def test_each_phase_ends_where_the_next_begins() -> None:
    assert names(1, 3, 4, 6, 9) == [
        ("receive", 1),
        ("queue", 2),
        ("engine_queue", 1),
        ("prefill", 2),
        ("decode", 3),
        ("deliver", 1),
    ]


def test_what_was_not_reached_leaves_its_time_to_the_last_phase_that_was() -> None:
    assert names(1, 0, 0, 0, 0) == [("receive", 1), ("queue", 9)]
    assert names(1, 3, 4, 0, 0) == [("receive", 1), ("queue", 2), ("engine_queue", 1), ("prefill", 6)]


def test_an_end_that_nobody_told_is_left_out() -> None:
    assert names(1, 0, 4, 6, 9)[1] == ("queue", 3)


@given(start=TIMES, end=TIMES, ends=st.lists(st.one_of(st.just(0.0), TIMES), min_size=5, max_size=5))
def test_whatever_the_clocks_say_the_phases_sum_to_the_whole(
    start: float, end: float, ends: list[float]
) -> None:
    phases = cut_phases(start, ends, end)
    assert sum(phase.seconds for phase in phases) == pytest.approx(max(0.0, end - start))
    assert all(phase.seconds > 0 for phase in phases)
    assert all(a.end_unix_s == b.start_unix_s for a, b in itertools.pairwise(phases))
    order = [PHASES.index(phase.name) for phase in phases]
    assert order == sorted(set(order))


def timeline(request_id: str, *, start: float = 0.0) -> Timeline:
    return Timeline(
        request_id=request_id,
        trace_id="",
        operation="chat",
        tenant="t",
        model="m",
        variant="v",
        worker_id="w",
        decision="",
        outcome="ok",
        start_unix_s=start,
        end_unix_s=start + 1,
        phases=(),
        events=(),
        attempts=1,
        preemptions=0,
        prompt_tokens=1,
        cached_prompt_tokens=0,
        completion_tokens=1,
        kv_load_s=0.0,
        kv_loaded_blocks=0,
        joules=0.0,
        grams_co2e=0.0,
    )


def test_so_many_timelines_are_kept_the_newest_first() -> None:
    kept = Timelines(3)
    for name in "abcda":
        kept.add(timeline(name, start=float(len(kept.latest(9)))))
    assert [found.request_id for found in kept.latest(9)] == ["a", "d", "c"]
    assert [found.request_id for found in kept.latest(2)] == ["a", "d"]
    newest = kept.find("a")
    assert newest is kept.latest(1)[0]
    assert kept.find("b") is None
