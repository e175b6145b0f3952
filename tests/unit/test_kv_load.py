"""The stall model: equal to stepping through the layers one by one, for every time and layer count."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.kv_load import (
    finish_s,
    is_worth_asking,
    layers_to_preload,
    read_buffer_bytes,
    stall_s,
    tokens_to_recompute,
)

TIMES = st.integers(0, 50)


def step_by_step(load: int, compute: int, layers: int, preloaded: int) -> int:
    time = 0
    for layer in range(1, layers + 1):
        ready = 0 if layer <= preloaded else (layer - preloaded) * load
        time = max(time, ready) + compute
    return time


@settings(max_examples=500, deadline=None)
@given(load=TIMES, compute=TIMES, layers=st.integers(1, 40), preloaded=st.integers(0, 45))
def test_the_finish_is_that_of_going_through_the_layers(
    load: int, compute: int, layers: int, preloaded: int
) -> None:
    expected = step_by_step(load, compute, layers, preloaded)
    assert finish_s(load, compute, layers, preloaded=preloaded) == expected
    assert stall_s(load, compute, layers, preloaded=preloaded) == expected - layers * compute


@settings(max_examples=500, deadline=None)
@given(load=TIMES, compute=TIMES, layers=st.integers(1, 40))
def test_fewest_layers_without_a_stall(load: int, compute: int, layers: int) -> None:
    fewest = next(k for k in range(layers + 1) if step_by_step(load, compute, layers, k) == layers * compute)
    assert layers_to_preload(load, compute, layers) == fewest


@pytest.mark.parametrize("load, compute", [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_what_cannot_overlap_is_loaded_before(load: float, compute: float) -> None:
    assert layers_to_preload(load, compute, 12) == 12


def test_the_forms_of_the_page_without_a_buffer() -> None:
    assert finish_s(2, 3, 10) == 2 + 10 * 3
    assert finish_s(5, 3, 10) == 10 * 5 + 3
    assert (10 * 4 + 10 * 4) / finish_s(4, 4, 10) == 2 * 10 / (10 + 1)  # against loading, then computing


def test_the_buffer_of_the_paper() -> None:
    buffer_bytes = partial(
        read_buffer_bytes, bandwidth_bytes_s=100.0, load_s_per_token=0.5, history_tokens=10, new_tokens=2
    )
    assert buffer_bytes(prefill_s_per_token=1.0) == 300
    assert buffer_bytes(prefill_s_per_token=9.0) == 0
    assert buffer_bytes(prefill_s_per_token=math.nan) == 0


@settings(max_examples=300, deadline=None)
@given(
    history=st.integers(0, 60),
    new=st.integers(1, 20),
    load_per_token=st.integers(0, 30),
    load_fixed=st.integers(0, 200),
    compute_per_token=st.integers(0, 30),
    step=st.integers(1, 16),
)
def test_the_split_is_the_best_of_all(
    history: int, new: int, load_per_token: int, load_fixed: int, compute_per_token: int, step: int
) -> None:
    def load(tokens: int) -> float:
        return load_fixed + load_per_token * tokens if tokens else 0

    def prefill(tokens: int, cached: int) -> float:
        return compute_per_token * tokens + (tokens * (tokens + 2 * cached)) // 7

    def cost(again: int) -> float:
        return max(load(history - again), prefill(new + again, history - again))

    chosen = tokens_to_recompute(history, new, load_s=load, prefill_s=prefill, step_tokens=step)
    assert chosen == history or chosen % step == 0
    assert cost(chosen) == min(map(cost, {*range(0, history, step), history}))
    asking = is_worth_asking(history, new, load_s=load, prefill_s=prefill, round_trip_s=5, step_tokens=step)
    best = min(map(cost, {*range(0, history, step), history}))
    assert asking == (history > 0 and chosen < history and 5 + best < prefill(new + history, 0))


def test_a_fast_link_recomputes_nothing_and_a_dead_one_everything() -> None:
    def prefill(tokens: int, cached: int) -> float:
        return tokens * 1e-3

    fast = tokens_to_recompute(4000, 100, load_s=lambda tokens: tokens * 1e-6, prefill_s=prefill)
    dead = tokens_to_recompute(4000, 100, load_s=lambda tokens: math.inf, prefill_s=prefill)
    assert (fast, dead) == (0, 4000)
    even = tokens_to_recompute(4000, 100, load_s=lambda tokens: tokens * 1e-3, prefill_s=prefill)
    assert even == 1950  # 2050 tokens each
    assert not is_worth_asking(4000, 100, load_s=lambda tokens: math.inf, prefill_s=prefill, round_trip_s=0.0)
