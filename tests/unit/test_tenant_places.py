"""A place is kept for those who ask little, and for nobody else."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from trireme.policies.tenant_places import FORGOTTEN_PLACES, KEPT_PLACES, may_take, used_of_late


def test_a_tenant_alone_may_hold_everything_and_what_the_workers_queue() -> None:
    flood = partial(may_take, "flood", used={"flood": 8.0}, backlogged=True, slots=8)
    assert flood(running_free=1, queueing_free=1)
    assert flood(running_free=0, queueing_free=1)
    assert not flood(running_free=0, queueing_free=0)


def test_a_flood_leaves_one_place_while_somebody_else_is_about() -> None:
    ask = partial(may_take, used={"flood": 6.0, "small": 1.6}, slots=8, queueing_free=1)
    assert ask("flood", backlogged=False, running_free=2)
    assert not ask("flood", backlogged=False, running_free=1)
    for tenant in ("small", "new"):
        assert ask(tenant, backlogged=True, running_free=1)
        assert ask(tenant, backlogged=True, running_free=0)


def test_who_holds_most_and_has_a_backlog_leaves_a_place_within_its_part_too() -> None:
    ask = partial(may_take, used={"flood": 3.9, "fair": 3.0}, slots=8, queueing_free=1)
    assert not ask("flood", backlogged=True, running_free=1)
    assert ask("flood", backlogged=False, running_free=1)
    assert ask("fair", backlogged=True, running_free=1)


def test_a_part_follows_the_weight() -> None:
    ask = partial(may_take, used={"big": 6.0, "small": 2.0}, slots=8, queueing_free=1, running_free=1)
    weights = {"big": 3.0}
    assert not ask("big", backlogged=False)
    assert ask("big", backlogged=False, weights=weights)
    assert ask("small", backlogged=False) and ask("small", backlogged=False, weights=weights)
    over = partial(ask, used={"big": 5.0, "small": 3.0}, backlogged=True, weights=weights)
    assert over("big") and not over("small")


def test_one_place_is_nobodys() -> None:
    used = {"a": 0.9, "b": 0.1}
    assert may_take("a", used=used, backlogged=True, slots=1, running_free=1, queueing_free=0)


TENANTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 20), min_size=1)


WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100))


@given(TENANTS, st.integers(1, 32), WEIGHTS)
def test_somebody_may_take_the_last_place_where_no_more_was_used_than_there_is(
    used: dict[str, float], slots: int, weights: dict[str, float]
) -> None:
    total = sum(used.values())
    used = {name: places * min(1.0, slots / total) for name, places in used.items()}
    weighed = {name: weights.get(name, 1.0) for name in used}
    least = min(used, key=lambda name: used[name] / weighed[name])
    # The least of them is at its part or below, rounding aside, and below the others.
    used[least] = 0.999 * min(used[least], slots * weighed[least] / sum(weighed.values()))
    assert may_take(
        least,
        used=used,
        backlogged=True,
        slots=slots,
        running_free=1,
        queueing_free=0,
        weights=weights,
    )


@given(TENANTS, st.integers(1, 32), st.sampled_from("abcdef"))
def test_beyond_the_kept_place_nobody_is_held_back(used: dict[str, float], slots: int, tenant: str) -> None:
    free = KEPT_PLACES + 1
    assert may_take(tenant, used=used, backlogged=True, slots=slots, running_free=free, queueing_free=0)


def test_what_a_tenant_used_is_forgotten_within_seconds() -> None:
    used = used_of_late({}, {"a": 4}, passed_s=60.0)
    assert used["a"] > 3.99
    used = used_of_late(used, {}, passed_s=5.0)
    assert 1.4 < used["a"] < 1.5
    assert used_of_late(used, {}, passed_s=30.0) == {}
    assert used_of_late({}, {"new": 1}, passed_s=0.0) == {"new": 0.0}
    assert FORGOTTEN_PLACES < 0.1
