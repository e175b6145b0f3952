"""Levels chosen by the demand: the model against a queue played event by event, and what it chooses."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.iteration_support import World, linear_profile
from trireme.policies.mlfq import MlfqScheduler, MlfqSettings
from trireme.policies.quanta import Demand, Point, _Queue, choose_thresholds, distribution


def complete(*services_s: float) -> list[Demand]:
    return [Demand(service_s, is_complete=True) for service_s in services_s]


def learning() -> MlfqScheduler:
    return MlfqScheduler(linear_profile(), MlfqSettings(alpha_s=math.inf, learns_quanta=True))


def played(services_s: list[float], ends_s: tuple[float, ...], *, rate: float, seed: int) -> float:
    """Mean time in a feedback queue of one server, preemptive, FIFO inside levels."""
    rng = random.Random(seed)
    arrivals: list[float] = []
    at_s = 0.0
    for _ in services_s:
        at_s += rng.expovariate(rate)
        arrivals.append(at_s)
    bounds = (*ends_s, math.inf)
    levels: list[deque[int]] = [deque() for _ in bounds]
    attained = [0.0] * len(services_s)
    now_s, coming, total_s, ended = 0.0, 0, 0.0, 0
    while ended < len(services_s):
        level = next((index for index, queue in enumerate(levels) if queue), None)
        next_s = arrivals[coming] if coming < len(arrivals) else math.inf
        if level is None:
            now_s = next_s
        else:
            job = levels[level][0]
            goal = min(services_s[job], bounds[level])
            end_s = now_s + goal - attained[job]
            if end_s <= next_s:
                now_s, attained[job] = end_s, goal
                levels[level].popleft()
                if goal == services_s[job]:
                    total_s += now_s - arrivals[job]
                    ended += 1
                else:
                    levels[level + 1].append(job)
                continue
            attained[job] += next_s - now_s
            now_s = next_s
        levels[0].append(coming)
        coming += 1
    return total_s / ended


@pytest.mark.parametrize("ends_s", [(), (1.0,), (0.5, 2.0)])
def test_the_model_tells_the_mean_time_of_a_played_queue(ends_s: tuple[float, ...]) -> None:
    rng = random.Random(1)
    services = [rng.expovariate(1.0) for _ in range(30_000)]
    demand = [Point(service, 1 / len(services)) for service in sorted(services)]
    model = _Queue(demand, 0.6, horizon_s=1e6).times(ends_s).mean_s
    assert model == pytest.approx(played(services, ends_s, rate=0.6, seed=2), rel=0.12)


def test_equal_demands_are_served_as_they_come() -> None:
    chosen = choose_thresholds(distribution(complete(*[2.0] * 50)), arrivals_per_s=0.6, horizon_s=100.0)
    assert all(end_s > 2.0 for end_s in chosen.ends_s)
    assert "too alike" in chosen.reason


def test_a_level_ends_between_the_many_short_and_the_few_long() -> None:
    sample = complete(*[1.0] * 90, *[60.0] * 10)
    chosen = choose_thresholds(distribution(sample), arrivals_per_s=0.12, horizon_s=10_000.0)
    assert any(1.0 <= end_s < 60.0 for end_s in chosen.ends_s)


def test_those_that_have_not_ended_weigh_on_those_that_needed_more() -> None:
    sample = [*complete(1.0, 1.0), Demand(2.0, is_complete=False), Demand(2.0, is_complete=False)]
    assert distribution(sample) == [Point(1.0, 0.25), Point(1.0, 0.25), Point(2.0, 0.5)]
    # Kaplan and Meier: what is censored at 1 counts for both that are known to need more.
    sample = [Demand(1.0, is_complete=False), *complete(1.0, 3.0, 5.0)]
    weights = [point.weight for point in distribution(sample)]
    assert weights == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@given(
    st.lists(st.tuples(st.floats(1e-4, 1e4), st.booleans()), min_size=1, max_size=200),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e6),
)
def test_any_sample_gives_ascending_thresholds(
    sample: list[tuple[float, bool]], rate: float, horizon_s: float
) -> None:
    demand = distribution([Demand(*item) for item in sample])
    assert len(demand) <= 66
    assert sum(point.weight for point in demand) == pytest.approx(1.0)
    assert [point.service_s for point in demand] == sorted(point.service_s for point in demand)
    chosen = choose_thresholds(demand, arrivals_per_s=rate, horizon_s=horizon_s)
    assert list(chosen.ends_s) == sorted(set(chosen.ends_s)) and chosen.ends_s
    assert chosen.reason


def test_jobs_alike_are_no_longer_interleaved_once_the_queue_knows_them() -> None:
    """Two jobs of 30 iterations: the page's quanta share the server, learned ones let the first end first."""
    world = World(learning(), max_sequences=1)
    for number in range(40):
        world.add(f"known-{number}", 1, 30)
        world.run()
    world.add("a", 1, 30)
    world.add("b", 1, 30)
    order: list[str] = []
    while world.sequences:
        world.step()
        order += [run.sequence_id for run in world.decisions[-1].runs]
    assert order == ["a"] * 30 + ["b"] * 30


def test_an_outlier_still_lets_others_pass() -> None:
    world = World(learning(), max_sequences=1)
    for number in range(40):
        world.add(f"known-{number}", 1, 5)
        world.run()
    world.add("huge", 500, 5)
    world.add("small", 1, 5)
    world.step()
    assert world.decisions[-1].runs[0].sequence_id == "small"
