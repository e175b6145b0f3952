"""The ledger's books: counters that restart, state that comes back whole, facts that make no sense."""

from __future__ import annotations

import math

import pytest

from trireme.policies.energy_attribution import EngineUse, Limits, Rule
from trireme.power.ledger import Ledger, Reading, Totals, engine_use, from_json
from trireme.wire.bus.v1.facts_pb2 import EngineWindow, Measurement


def turn(
    ledger: Ledger,
    now_s: float,
    joules: float | None,
    *,
    epoch: str = "boot",
    uses: tuple[EngineUse, ...] = (),
) -> None:
    reading = None if joules is None else Reading(round(joules * 1e6), now_s, epoch)
    ledger.books["cpu"].turn(
        now_s=now_s, reading=reading, uses=uses, grams_co2e_per_kwh=360.0, limits=Limits(), rule=Rule()
    )


def opened(now_s: float = 100.0) -> Ledger:
    ledger = Ledger()
    ledger.open_book("cpu", "rapl", now_s=now_s)
    return ledger


def test_only_what_the_meter_adds_is_metered() -> None:
    ledger = opened()
    for now_s, joules in ((100.0, 5000.0), (101.0, 5010.0), (102.0, 5030.0)):
        turn(ledger, now_s, joules)
    assert ledger.books["cpu"].totals.metered_uj == 30_000_000


@pytest.mark.parametrize(("joules", "epoch"), [(7.0, "boot"), (9000.0, "other boot")])
def test_a_counter_that_begins_anew_leaves_a_hole_and_no_energy(joules: float, epoch: str) -> None:
    ledger = opened()
    turn(ledger, 100.0, 5000.0)
    turn(ledger, 101.0, 5010.0)
    turn(ledger, 104.0, joules, epoch=epoch)
    turn(ledger, 105.0, joules + 4.0, epoch=epoch)
    account = ledger.books["cpu"].account
    assert account.metered_uj == 14_000_000
    assert account.unmetered_s == pytest.approx(3.0)


def test_a_failed_reading_is_made_good_by_the_next() -> None:
    ledger = opened()
    turn(ledger, 100.0, 5000.0)
    turn(ledger, 101.0, None)
    turn(ledger, 102.0, 5020.0)
    account = ledger.books["cpu"].account
    assert (account.metered_uj, account.unmetered_s) == (20_000_000, 0.0)


def test_the_state_comes_back_as_it_was() -> None:
    ledger = opened()
    ledger.duplicate_facts = 3
    for index in range(40):
        use = EngineUse(
            end_s=100.0 + index, window_s=1.0, busy_s=0.5, billed_engine_s=0.5, billed_uj=7_000_001
        )
        turn(ledger, 100.0 + index, 20.0 * index, uses=(use,))
    assert from_json(ledger.to_json()) == ledger


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99}', '{"version": 1, "books": {"cpu": {}}}'])
def test_a_damaged_state_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_the_last_hour_forgets() -> None:
    ledger = opened(0.0)
    turn(ledger, 0.0, 0.0)
    turn(ledger, 60.0, 100.0)
    turn(ledger, 1800.0, 250.0)
    book = ledger.books["cpu"]
    assert book.last_hour(1800.0).metered_uj == 250_000_000
    assert book.last_hour(3700.0).metered_uj == 150_000_000
    assert book.last_hour(90_000.0) == Totals()
    assert book.totals.metered_uj == 250_000_000


def test_another_kind_of_meter_opens_a_new_book() -> None:
    ledger = opened()
    turn(ledger, 100.0, 0.0)
    turn(ledger, 101.0, 9.0)
    ledger.open_book("cpu", "cpu-model", now_s=102.0)
    assert ledger.books["cpu"].totals.metered_uj == 0


def fact(**changes: float) -> Measurement:
    values = {"busy_s": 0.5, "billed_joules": 2.0, "billed_engine_s": 0.5, **changes}
    at_s, window_s = values.pop("at_unix_s", 100.0), values.pop("window_s", 1.0)
    engine = EngineWindow()
    for name, value in values.items():
        setattr(engine, name, value)
    return Measurement(id="m", at_unix_s=at_s, window_s=window_s, engine=engine)


def test_a_sound_fact_is_taken() -> None:
    use = engine_use(fact())
    assert use == EngineUse(end_s=100.0, window_s=1.0, busy_s=0.5, billed_engine_s=0.5, billed_uj=2_000_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"busy_s": -1.0},
        {"busy_s": math.nan},
        {"billed_joules": math.inf},
        {"billed_joules": 1e12},
        {"billed_engine_s": -0.1},
        {"window_s": 0.0},
        {"window_s": math.nan},
        {"window_s": 1e9},
        {"at_unix_s": math.nan},
    ],
)
def test_a_fact_out_of_range_is_refused(changes: dict[str, float]) -> None:
    assert engine_use(fact(**changes)) is None


def test_a_fact_without_an_id_is_refused() -> None:
    nameless = fact()
    nameless.id = ""
    assert engine_use(nameless) is None
