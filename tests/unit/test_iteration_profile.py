"""Iteration profiles: exact on the grid, straight between, fitted above; learnt from a running engine."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration_profile import DecodePoint, IterationProfile, Part, PrefillPoint
from trireme.policies.least_squares import non_negative_solution
from trireme.policies.profile_estimator import ProfileEstimator

TOKENS = (32, 64, 128, 256, 512, 1024)


def cost_s(parts: list[Part]) -> float:
    """A made-up machine: fixed cost, cost per token, per sequence, per KV read and per pair."""
    seconds = 2e-3
    for sequences, new, cached in parts:
        pairs = new * cached + new * (new + 1) / 2
        seconds += sequences * (2e-5 * new + 1e-4 + 4e-8 * (cached + new) + 2e-9 * pairs)
    return seconds


def measured(cached: tuple[int, ...] = (0, 256, 1024)) -> IterationProfile:
    prefill = [PrefillPoint(n, h, cost_s([Part(1, n, h)])) for n in TOKENS for h in cached]
    decode = [DecodePoint(b, c, cost_s([Part(b, 1, c - 1)])) for b in (1, 2, 4, 8, 16) for c in (64, 1024)]
    return IterationProfile(tuple(prefill), tuple(decode))


def test_the_grid_is_returned_as_measured_and_straight_between() -> None:
    profile = measured()
    for new, cached, seconds in profile.prefill:
        assert profile.first_iteration_s(new, cached) == pytest.approx(seconds)
    low, high = profile.first_iteration_s(64, 256), profile.first_iteration_s(128, 256)
    assert low is not None and high is not None
    assert profile.first_iteration_s(96, 256) == pytest.approx((low + high) / 2)
    between = [profile.first_iteration_s(64, cached) or math.nan for cached in (256, 1024)]
    assert profile.first_iteration_s(64, 640) == pytest.approx(sum(between) / 2)


def test_above_the_grid_the_parabola_goes_on() -> None:
    profile = measured()
    for new in (2048, 8192, 100_000):
        assert profile.first_iteration_s(new) == pytest.approx(cost_s([Part(1, new, 0)]), rel=0.02)
        clamped = cost_s([Part(1, 1024, 0)])
        assert (profile.first_iteration_s(new) or 0.0) > 1.5 * clamped
    assert profile.first_iteration_s(512, 4096) == pytest.approx(cost_s([Part(1, 512, 4096)]), rel=0.02)


def test_a_context_that_was_never_measured_costs_what_the_parabola_implies() -> None:
    profile = measured(cached=(0,))
    assert profile.first_iteration_s(1024, 8192) == pytest.approx(cost_s([Part(1, 1024, 8192)]), rel=0.05)


def test_a_mixed_iteration_pays_what_is_common_once() -> None:
    parts = [Part(8, 1, 63), Part(1, 256, 0)]
    assert measured().iteration_s(parts) == pytest.approx(cost_s(parts), rel=0.1)


@given(st.lists(st.floats(1e-4, 1.0), min_size=6, max_size=6), st.integers(1, 10_000), st.integers(0, 10_000))
def test_whatever_was_measured_a_time_is_positive_and_rises_above_the_grid(
    seconds: list[float], new: int, cached: int
) -> None:
    points = tuple(PrefillPoint(n, 0, s) for n, s in zip(TOKENS, seconds, strict=True))
    profile = IterationProfile(points, ())
    found = profile.first_iteration_s(new, cached)
    assert found is not None and 0 < found < math.inf
    above = [profile.first_iteration_s(n) or 0.0 for n in (1024, 2048, 4096)]
    assert all(a <= b for a, b in pairwise(above))


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf])
def test_what_is_no_time_is_missing(bad: float) -> None:
    profile = IterationProfile((PrefillPoint(16, 0, bad),), (DecodePoint(1, 16, bad),))
    assert profile.first_iteration_s(16) is None
    assert profile.decode_s(1) is None
    assert profile.quantum_s is None
    assert profile.iteration_s([Part(1, 16, 0)]) is None


def test_the_first_quantum_is_the_tenth_percentile_of_single_decodes() -> None:
    decode = tuple(DecodePoint(1, context, 0.010 + 0.001 * context) for context in range(20))
    assert IterationProfile((), decode).quantum_s == pytest.approx(0.012)
    assert IterationProfile((), (DecodePoint(4, 16, 0.02),)).quantum_s == 0.02


def test_a_profile_survives_json_and_follows_the_clock() -> None:
    profile = measured()
    again = IterationProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile
    assert again.scaled(0.5).first_iteration_s(512, 256) == pytest.approx(
        2 * (profile.first_iteration_s(512, 256) or math.nan)
    )
    assert again.scaled(0.5).quantum_s == pytest.approx(2 * (profile.quantum_s or math.nan))
    for broken in ({}, {"prefill": [[1]], "decode": []}, {"prefill": [["a", 0, 1]], "decode": []}):
        with pytest.raises(InvalidConfiguration):
            IterationProfile.from_dict(broken)


def test_samples_of_one_kind_make_the_grid() -> None:
    profile = IterationProfile.from_samples(
        [
            ([(1, 64, 0)], 0.5),
            ([(3, 1, 9), (1, 1, 13)], 0.1),
            ([(1, 64, 0), (1, 1, 9)], 9.0),
            ([(2, 64, 0)], 9.0),
        ]
    )
    assert profile.prefill == (PrefillPoint(64, 0, 0.5),)
    assert profile.decode == (DecodePoint(4, 11, 0.1),)


def test_least_squares_finds_the_weights_and_none_below_zero() -> None:
    rows = [[1.0, x, x * x] for x in (0.0, 1.0, 2.0, 3.0)]
    assert non_negative_solution(rows, [2.0 + 3.0 * x for _, x, _ in rows]) == pytest.approx(
        [2.0, 3.0, 0.0], abs=1e-6
    )
    falling = non_negative_solution(rows, [3.0, 2.0, 1.0, 0.5])
    assert min(falling) >= 0.0 and falling[0] == pytest.approx(1.625)


def learnt(num_iterations: int, *, factor: float = 1.0, seed: int = 1) -> ProfileEstimator:
    estimator = ProfileEstimator()
    teach(estimator, num_iterations, factor=factor, seed=seed)
    return estimator


def teach(estimator: ProfileEstimator, num_iterations: int, *, factor: float, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_iterations):
        parts = [Part(1, 1, rng.randrange(10, 2000)) for _ in range(rng.randrange(0, 12))]
        if rng.random() < 0.4 or not parts:
            parts.append(Part(1, rng.randrange(8, 512), rng.choice([0, 0, 128, 900])))
        estimator.observe(parts, factor * cost_s(parts) * rng.uniform(0.95, 1.05))


def test_a_profile_is_learnt_from_warm_up_steps() -> None:
    assert learnt(15).profile() is None
    profile = learnt(64).profile()
    assert profile is not None
    for parts in ([Part(1, 300, 0)], [Part(1, 1000, 500)]):
        found = profile.first_iteration_s(parts[0].new_tokens, parts[0].cached_tokens)
        assert found == pytest.approx(cost_s(parts), rel=0.1)
    assert profile.decode_s(8, 1000) == pytest.approx(cost_s([Part(8, 1, 999)]), rel=0.1)


def test_decoding_alone_says_nothing_about_prompts() -> None:
    estimator = ProfileEstimator()
    for _ in range(100):
        estimator.observe([Part(4, 1, 100)], 0.01)
    assert estimator.profile() is None


def test_a_learnt_profile_follows_a_change_and_shrugs_off_stalls_and_nonsense() -> None:
    estimator = learnt(400)
    before = estimator.profile()
    for bad in (math.nan, -1.0, math.inf, 0.0):
        estimator.observe([Part(1, 16, 0)], bad)
    estimator.observe([], 1.0)
    assert estimator.profile() == before
    estimator.observe([Part(1, 100, 0)], 30.0)
    stalled = estimator.profile()
    assert before is not None and stalled is not None
    assert stalled.first_iteration_s(100) == pytest.approx(before.first_iteration_s(100), rel=0.1)
    teach(estimator, 3000, factor=2.0, seed=2)
    slower = estimator.profile()
    assert slower is not None
    assert slower.first_iteration_s(300) == pytest.approx(2 * cost_s([Part(1, 300, 0)]), rel=0.1)


def test_single_decodes_are_remembered_for_the_first_quantum() -> None:
    estimator = learnt(64)
    for _ in range(64):
        estimator.observe([Part(1, 1, 99)], 0.0015)
    profile = estimator.profile()
    assert profile is not None and profile.quantum_s == pytest.approx(0.0015)
