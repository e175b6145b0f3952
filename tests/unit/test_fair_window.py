"""The fair window: the same order as sorting everything, and no tenant is starved by another."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.fair_sharing import Waiting, cost, lift, order_key
from trireme.policies.fair_window import FairWindow


def waiting(
    name: str, *, tenant: str = "t", urgency: int = 1, priority: int = 0, admitted_s: float = 0.0
) -> Waiting:
    return Waiting(request_id=name, tenant=tenant, urgency=urgency, priority=priority, admitted_s=admitted_s)


def test_the_tenant_served_least_goes_next() -> None:
    window: FairWindow[str] = FairWindow()
    window.add("1", waiting("1", tenant="rich", admitted_s=0), model="m")
    window.add("2", waiting("2", tenant="poor", admitted_s=5), model="m")
    found = window.next(counters={"rich": 100.0, "poor": 10.0}, now_s=6)
    assert found is not None and found[0] == "2"


def test_interactive_goes_before_batch_until_batch_has_waited_long() -> None:
    window: FairWindow[str] = FairWindow()
    window.add("batch", waiting("batch", urgency=2, admitted_s=0), model="m")
    window.add("chat", waiting("chat", urgency=0, admitted_s=100), model="m")
    soon = window.next(counters={}, now_s=101)
    late = window.next(counters={}, now_s=121)
    assert soon is not None and soon[0] == "chat"
    assert late is not None and late[0] == "batch"


def test_an_absent_tenant_saves_up_no_credit() -> None:
    counters = {"busy": 500.0, "other": 700.0, "back": 3.0}
    assert lift(counters, tenant="back", active=["busy", "other"]) == 500.0
    assert lift(counters, tenant="other", active=["busy"]) == 700.0
    assert lift({}, tenant="first", active=[]) == 0.0


def test_two_tenants_that_always_wait_are_served_alike_whatever_they_send() -> None:
    # One sends requests of 10 weighted tokens, the other of 1000: they get equal weighted service.
    window: FairWindow[int] = FairWindow()
    counters = {"small": 0.0, "large": 0.0}
    sizes = {"small": 10.0, "large": 1000.0}
    for number in range(2000):
        tenant = "small" if number < 1900 else "large"
        window.add(number, waiting(str(number), tenant=tenant, admitted_s=number), model="m")
    for _ in range(1000):
        found = window.next(counters=counters, now_s=2000)
        assert found is not None
        window.discard(found[0])
        counters[found[1].tenant] += sizes[found[1].tenant]
    assert abs(counters["small"] - counters["large"]) <= max(sizes.values())


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 100)), min_size=1, max_size=8),
    chosen=st.randoms(use_true_random=False),
)
def test_tenants_that_always_wait_are_served_in_proportion_to_their_weights(
    weights: list[float], sizes: list[tuple[int, int]], chosen: random.Random
) -> None:
    window: FairWindow[int] = FairWindow()
    tenants = {str(number): weight for number, weight in enumerate(weights)}
    counters = dict.fromkeys(tenants, 0.0)
    served = dict.fromkeys(tenants, 0.0)
    size_of: dict[int, tuple[int, int]] = {}

    def ask(tenant: str) -> None:
        number = len(size_of)
        size_of[number] = chosen.choice(sizes)
        window.add(number, waiting(str(number), tenant=tenant, admitted_s=number), model="m")

    for tenant in tenants:
        ask(tenant)
    for _ in range(200):
        found = window.next(counters=counters, now_s=0.0)
        assert found is not None
        window.discard(found[0])
        tenant, (prompt, answer) = found[1].tenant, size_of[found[0]]
        counters[tenant] += cost(prompt_tokens=prompt, answer_tokens=answer, tenant_weight=tenants[tenant])
        served[tenant] += prompt + 2.0 * answer
        ask(tenant)
    # Whoever is behind goes next: what each got over its weight differs by a request of one of them.
    largest = max(prompt + 2.0 * answer for prompt, answer in sizes)
    for one, weight in tenants.items():
        for other, others in tenants.items():
            gap = served[one] / weight - served[other] / others
            rounding = 1e-9 * (1.0 + served[one] / weight + served[other] / others)
            assert gap <= largest / weight + rounding


def test_a_model_without_room_does_not_hold_up_another() -> None:
    window: FairWindow[str] = FairWindow()
    window.add("1", waiting("1"), model="full")
    window.add("2", waiting("2", admitted_s=1), model="free")
    found = window.next(counters={}, now_s=2, without_models={"full"})
    assert found is not None and found[0] == "2"


def test_weights_follow_the_work() -> None:
    assert cost(prompt_tokens=10, answer_tokens=5) == 20.0


requests = st.builds(
    Waiting,
    request_id=st.uuids().map(str),
    tenant=st.sampled_from("abc"),
    urgency=st.integers(0, 2),
    priority=st.integers(-1, 1),
    admitted_s=st.integers(0, 5).map(float),
)


@given(
    st.lists(st.tuples(requests, st.sampled_from(["m", "n"])), max_size=30),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5).map(float)),
    st.lists(st.integers(0, 29), max_size=10),
)
def test_the_window_agrees_with_sorting_everything(
    items: list[tuple[Waiting, str]], counters: dict[str, float], dropped: list[int]
) -> None:
    window: FairWindow[int] = FairWindow()
    held = dict(enumerate(items))
    for key, (item, model) in held.items():
        window.add(key, item, model=model)
    for key in dropped:
        window.discard(key)
        held.pop(key, None)
    order = []
    while (found := window.next(counters=counters, now_s=10.0)) is not None:
        order.append(found[0])
        window.discard(found[0])
    keys = {k: order_key(item, counters=counters, now_s=10.0) for k, (item, _) in held.items()}
    assert sorted(order) == sorted(held)
    assert [keys[k] for k in order] == sorted(keys.values())
    assert len(window) == 0 and not window.waiting_by_tenant


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 200), st.booleans()
    ),
    max_size=25,
)


@given(requests=REQUESTS, now_s=st.integers(0, 400))
def test_what_is_upcoming_is_what_next_names_one_after_another(
    requests: list[tuple[str, int, int, int, bool]], now_s: int
) -> None:
    window: FairWindow[int] = FairWindow()
    for number, (tenant, urgency, priority, admitted_s, _) in enumerate(requests):
        entry = waiting(
            f"{number:02d}", tenant=tenant, urgency=urgency, priority=priority, admitted_s=admitted_s
        )
        window.add(number, entry, model="m" if number % 2 else "n")
    for number, request in enumerate(requests):
        if request[4]:
            window.discard(number)
    counters = {"a": 5.0, "b": 0.0, "c": 9.0}

    def cost_of(number: int) -> float:
        return float(number % 7)

    told = list(window.upcoming(counters=counters, now_s=now_s, cost_of=cost_of))
    assert len(told) == len(window)
    for number in told:
        found = window.next(counters=counters, now_s=now_s)
        assert found is not None and found[0] == number
        window.discard(number)
        counters[found[1].tenant] += cost_of(number)
