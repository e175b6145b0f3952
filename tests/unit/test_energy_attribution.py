"""The ledger sums to the meter exactly, idle energy is nobody's, and steady bills meet the meter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.energy_attribution import (
    Account,
    EngineUse,
    Limits,
    MeterWindow,
    Rule,
    Window,
    active_uj,
    advance,
    opened,
)
from trireme.policies.energy_billing import (
    bill_joules,
    grams_co2e,
    metered_device,
    per_1k_tokens,
    split_step_s,
    tariff_for,
)

NO_LIMITS = Limits()


def window(energy_j: float, *, busy_s: float, billed_s: float | None = None) -> Window:
    return Window(
        start_s=0.0,
        end_s=1.0,
        energy_uj=round(energy_j * 1e6),
        grams_co2e_per_kwh=100.0,
        busy_s=busy_s,
        billed_engine_s=busy_s if billed_s is None else billed_s,
    )


def use(end_s: float, *, busy_s: float = 1.0, joules: float = 0.0, window_s: float = 1.0) -> EngineUse:
    return EngineUse(
        end_s=end_s, window_s=window_s, busy_s=busy_s, billed_engine_s=busy_s, billed_uj=round(joules * 1e6)
    )


def reading(start_s: float, energy_j: float, *, length_s: float = 1.0) -> MeterWindow:
    return MeterWindow(
        start_s=start_s, end_s=start_s + length_s, energy_uj=round(energy_j * 1e6), grams_co2e_per_kwh=360.0
    )


def assert_sums(account: Account) -> None:
    assert account.metered_uj == account.billed_uj + account.idle_uj + account.unattributed_uj
    parts_uj = account.pending_uj + account.carry_uj + account.written_off_uj
    assert account.unattributed_uj == parts_uj


# --- the active part of a window


def test_a_window_without_engine_time_is_all_idle() -> None:
    assert active_uj(window(50.0, busy_s=0.0), idle_w=20.0, max_w=None) == 0


def test_a_busy_window_is_all_active() -> None:
    assert active_uj(window(50.0, busy_s=1.0), idle_w=20.0, max_w=None) == 50_000_000


def test_a_quarter_busy_window_takes_a_quarter_of_the_idle_draw_and_all_above_it() -> None:
    assert active_uj(window(50.0, busy_s=0.25), idle_w=20.0, max_w=None) == 35_000_000


def test_a_short_step_is_not_billed_more_than_the_device_can_draw_in_it() -> None:
    # 10 ms of engine on a 100 W device while something else drew 80 W: 0.2 J idle + 0.8 J own.
    assert active_uj(window(80.0, busy_s=0.01), idle_w=20.0, max_w=100.0) == 1_000_000


def test_engine_time_that_served_no_request_is_not_billed() -> None:
    assert active_uj(window(50.0, busy_s=1.0, billed_s=0.5), idle_w=20.0, max_w=None) == 25_000_000


def test_a_trace_of_engine_time_prices_nothing() -> None:
    assert active_uj(window(50.0, busy_s=0.0005), idle_w=20.0, max_w=None) == 0


# --- the exact sum, whatever comes


uses_strategy = st.lists(
    st.builds(
        use,
        st.floats(-30, 90),
        busy_s=st.floats(0, 8),
        joules=st.floats(0, 500),
        window_s=st.floats(0.01, 40),
    ),
    max_size=4,
)
turns_strategy = st.lists(
    st.tuples(
        st.floats(0.01, 30),  # seconds since the last turn
        st.floats(0, 2000),  # joules
        st.sampled_from(["read", "read", "read", "failed", "hole"]),
        uses_strategy,
    ),
    min_size=1,
    max_size=30,
)


@given(turns_strategy, st.sampled_from([None, 5.0]), st.sampled_from([None, 200.0]))
@settings(max_examples=150, deadline=None)
def test_accounts_sum_to_the_meter_and_the_carry_is_bounded(
    turns: list[tuple[float, float, str, list[EngineUse]]], idle_w: float | None, max_w: float | None
) -> None:
    account, now_s, last_end_s = opened(0.0), 0.0, 0.0
    metered_uj = passed_uj = posted_idle_uj = 0
    for passed_s, joules, what, uses in turns:
        now_s += passed_s
        start_s = now_s - passed_s / 2 if what == "hole" else last_end_s
        meter = None
        if what != "failed":
            meter = reading(start_s, joules, length_s=now_s - start_s)
            metered_uj += meter.energy_uj
            last_end_s = meter.end_s
        passed_uj += sum(one.billed_uj for one in uses)
        account = advance(
            account,
            now_s=now_s,
            meter=meter,
            uses=uses,
            limits=Limits(idle_w=idle_w, max_w=max_w),
            rule=Rule(),
        )
        assert_sums(account)
        assert account.metered_uj == metered_uj
        assert account.billed_uj + account.unmetered_billed_uj == passed_uj
        assert account.idle_uj >= posted_idle_uj, "the idle account never shrinks"
        posted_idle_uj = account.idle_uj
        assert abs(account.carry_uj) <= sum(own_uj for own_uj, _ in account.recent)
        assert math.isfinite(account.tariff) and account.tariff >= 0


# --- a worker and a meter that play together


@dataclass(frozen=True)
class Played:
    account: Account
    billed_of_active: float
    """Over the last 50 windows."""


def play(
    load: Callable[[int], float],
    *,
    windows: int,
    idle_w: float = 20.0,
    max_w: float = 100.0,
    workers: int = 1,
    delay: int = 0,
    limits: Limits = NO_LIMITS,
    start: Account | None = None,
) -> Played:
    """Each worker bills its share at the tariff in force; its fact arrives `delay` windows later."""
    account = start or opened(0.0)
    facts: list[tuple[int, EngineUse]] = []
    marks: list[tuple[int, int]] = []
    active_total_uj = 0
    for index in range(windows):
        busy = load(index)
        energy_j = idle_w + (max_w - idle_w) * min(1.0, busy)
        active_total_uj += round((idle_w * min(1.0, busy) + (max_w - idle_w) * min(1.0, busy)) * 1e6)
        for _ in range(workers if busy > 0 else 0):
            share_s = busy / workers
            joules = bill_joules(share_s, account.tariff)
            facts.append((index + delay, use(index + 1.0, busy_s=share_s, joules=joules)))
        due = [fact for at, fact in facts if at <= index]
        facts = [(at, fact) for at, fact in facts if at > index]
        account = advance(
            account,
            now_s=index + 1.0,
            meter=reading(float(index), energy_j),
            uses=due,
            limits=limits,
            rule=Rule(),
        )
        assert_sums(account)
        marks.append((active_total_uj, account.billed_uj))
    span = (marks[-1][0] - marks[-51][0], marks[-1][1] - marks[-51][1])
    return Played(account, span[1] / span[0])


@given(
    busy=st.floats(0.05, 1.0),
    idle_w=st.floats(1, 100),
    above_w=st.floats(1, 600),
    workers=st.integers(1, 4),
    delay=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_under_steady_load_what_is_billed_converges_to_what_is_active(
    busy: float, idle_w: float, above_w: float, workers: int, delay: int
) -> None:
    played = play(
        lambda index: busy if index >= 20 else 0.0,
        windows=500,
        idle_w=idle_w,
        max_w=idle_w + above_w,
        workers=workers,
        delay=delay,
    )
    assert played.billed_of_active == pytest.approx(1.0, abs=0.01)
    recent_uj = sum(own_uj for own_uj, _ in played.account.recent)
    assert abs(played.account.carry_uj) < 0.02 * recent_uj


@given(factor=st.floats(0.05, 20.0))
@settings(max_examples=20, deadline=None)
def test_a_wrong_price_is_paid_back(factor: float) -> None:
    steady = play(lambda _: 0.5, windows=100).account
    account = Account(
        since_s=0.0,
        watched_since_s=0.0,
        tariff=steady.tariff * factor,
        recent=steady.recent,
        idle_w=20.0,
    )
    played = play(lambda _: 0.5, windows=500, start=account)
    assert played.billed_of_active == pytest.approx(1.0, abs=0.01)


def test_sparse_requests_pay_for_themselves_and_not_for_the_pauses_between() -> None:
    played = play(lambda index: 0.3 if index % 30 == 0 else 0.0, windows=3000, limits=Limits(max_w=100.0))
    account = played.account
    own_uj = 100 * 0.3 * 100 * 1e6  # 100 requests of 0.3 s at 100 W
    assert account.billed_uj == pytest.approx(own_uj, rel=0.1)
    assert account.idle_uj == pytest.approx(account.metered_uj - own_uj, rel=0.02)


def test_the_carry_is_not_kept_for_a_request_that_comes_much_later() -> None:
    account = opened(0.0)
    for index in range(30):  # 30 s of work that nobody is billed for: the tariff came too late
        uses = [use(index + 1.0, joules=0.0)]
        account = advance(
            account, now_s=index + 1.0, meter=reading(index, 100.0), uses=uses, limits=NO_LIMITS, rule=Rule()
        )
    for index in range(30, 630):
        account = advance(
            account, now_s=index + 1.0, meter=reading(index, 20.0), uses=[], limits=NO_LIMITS, rule=Rule()
        )
    assert abs(account.carry_uj) < 2_000_000
    assert account.written_off_uj == pytest.approx(30 * 100e6, rel=0.01)
    assert_sums(account)


def test_workers_on_one_meter_pay_together_for_its_active_energy() -> None:
    account = play(lambda _: 0.9, windows=200, workers=3, limits=Limits(idle_w=20.0)).account
    together_j = sum(bill_joules(share_s, account.tariff) for share_s in (0.2, 0.3, 0.4))
    assert together_j == pytest.approx(0.9 * 100.0, rel=0.01)


# --- time


def test_a_late_fact_counts_for_the_window_it_is_of() -> None:
    account = opened(0.0)
    for index in range(10):
        account = advance(
            account, now_s=index + 1.0, meter=reading(index, 100.0), uses=[], limits=NO_LIMITS, rule=Rule()
        )
    late = use(3.0, joules=90.0)
    account = advance(account, now_s=10.5, meter=None, uses=[late], limits=NO_LIMITS, rule=Rule())
    assert [w.billed_uj for w in account.windows[:4]] == [0, 0, 90_000_000, 0]


def test_a_fact_that_straddles_windows_is_split_by_time() -> None:
    account = opened(0.0)
    for index in range(3):
        account = advance(
            account, now_s=index + 1.0, meter=reading(index, 1.0), uses=[], limits=NO_LIMITS, rule=Rule()
        )
    straddling = use(2.25, joules=8.0)
    account = advance(account, now_s=3.0, meter=None, uses=[straddling], limits=NO_LIMITS, rule=Rule())
    assert [w.billed_uj for w in account.windows] == [0, 6_000_000, 2_000_000]


def test_a_fact_that_runs_ahead_of_the_meter_counts_for_the_newest_window() -> None:
    account = opened(0.0)
    for index in range(2):
        account = advance(
            account, now_s=index + 1.0, meter=reading(index, 1.0), uses=[], limits=NO_LIMITS, rule=Rule()
        )
    ahead = use(2.4, joules=10.0)
    account = advance(account, now_s=2.4, meter=None, uses=[ahead], limits=NO_LIMITS, rule=Rule())
    assert [w.billed_uj for w in account.windows] == [0, 10_000_000]
    assert account.unmetered_billed_uj == 0


def test_what_was_billed_while_no_meter_watched_stands_outside_the_sum() -> None:
    account = advance(opened(0.0), now_s=1.0, meter=reading(0.0, 5.0), uses=[], limits=NO_LIMITS, rule=Rule())
    # The meter was away from 1 s to 4 s; the fact covers 3 s..5 s.
    account = advance(
        account,
        now_s=5.0,
        meter=reading(4.0, 5.0),
        uses=[use(5.0, joules=8.0, window_s=2.0)],
        limits=NO_LIMITS,
        rule=Rule(),
    )
    assert (account.billed_uj, account.unmetered_billed_uj) == (4_000_000, 4_000_000)
    assert account.unmetered_s == pytest.approx(3.0)
    assert_sums(account)


def test_the_first_tariff_is_half_way_between_idle_and_full_draw() -> None:
    account = advance(
        opened(0.0),
        now_s=1.0,
        meter=reading(0.0, 2.0),
        uses=[],
        limits=Limits(idle_w=2.0, max_w=8.0),
        rule=Rule(),
    )
    assert account.tariff == 5.0


def test_emissions_follow_the_intensity_of_their_time() -> None:
    account = advance(
        opened(0.0), now_s=1.0, meter=reading(0.0, 3600.0), uses=[], limits=NO_LIMITS, rule=Rule()
    )
    assert account.metered_g == pytest.approx(0.36)  # 1 Wh at 360 g/kWh


# --- the worker's side


def test_a_step_is_shared_in_proportion_to_tokens() -> None:
    assert split_step_s(0.3, [1, 2]) == pytest.approx((0.1, 0.2))
    assert split_step_s(0.3, [0, 0, 0]) == pytest.approx((0.1, 0.1, 0.1))
    assert split_step_s(0.3, []) == ()


@given(st.floats(0, 10), st.lists(st.integers(0, 4096), min_size=1, max_size=64))
def test_a_steps_shares_sum_to_it(step_s: float, tokens: list[int]) -> None:
    assert sum(split_step_s(step_s, tokens)) == pytest.approx(step_s)


@pytest.mark.parametrize(
    ("device", "meter"),
    [("cpu", "cpu"), ("null", "cpu"), ("cuda:1", "cuda:1"), ("cuda:1/mig:2", "cuda:1")],
)
def test_a_slice_is_covered_by_its_boards_meter(device: str, meter: str) -> None:
    assert metered_device(device) == meter


def test_a_worker_takes_its_own_nodes_tariff_and_ignores_others() -> None:
    rates = {"a/cpu": 4.0, "cpu": 4.0, "": 4.0}
    assert tariff_for(rates, node="a", device="null") == 4.0
    assert tariff_for(rates, node="b", device="cpu") is None
    assert tariff_for({"cuda:0": 300.0, "": 5.0}, node="b", device="cuda:0/mig:1") == 300.0
    assert tariff_for({"": 5.0}, node="b", device="cpu") == 5.0


def test_units() -> None:
    assert grams_co2e(3.6e6, 436.0) == 436.0
    assert per_1k_tokens(2.0, 500) == 4.0
    assert per_1k_tokens(2.0, 0) == 0.0


def test_the_example_of_the_docs() -> None:
    """docs/energy.md: 50 J in a second, 20 W idle, a quarter of it busy with two requests."""
    own_j = active_uj(window(50.0, busy_s=0.25), idle_w=20.0, max_w=None) / 1e6
    tariff = own_j / 0.25
    joules = [bill_joules(share_s, tariff) for share_s in split_step_s(0.25, [30, 10])]
    assert (own_j, tariff, joules) == (35.0, 140.0, [26.25, 8.75])
    assert grams_co2e(26.25, 257.0) == pytest.approx(0.001874, abs=1e-6)
    assert per_1k_tokens(26.25, 30) == 875.0
