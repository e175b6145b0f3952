"""Admission: the bounds hold, who floods waits behind itself, hints are true in a modelled fleet."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from trireme.policies.admission import (
    Ask,
    Backlog,
    QueueView,
    Refusal,
    Verdict,
    decide,
    pressure,
    share_of_queue,
    shared_from,
    tokens_ahead,
)
from trireme.policies.brown_out import FALL_BELOW, FALL_S, RISE_ABOVE, RISE_S, BrownOut, Level, step
from trireme.policies.drain_rate import ENOUGH_S, DrainRate, Look, observe
from trireme.policies.retry_hints import LONGEST_S, MAX_TENANTS, RetryHints


def ask(tenant: str = "me", *, tokens: float = 100.0, first_token_s: float = 10.0, **more: object) -> Ask:
    return Ask(tenant=tenant, urgency=1, tokens=tokens, first_token_s=first_token_s, **more)  # type: ignore[arg-type]


def backlog(
    tenant: str, tokens: float, *, urgency: int = 1, requests: int = 1, weight: float = 1.0
) -> Backlog:
    return Backlog(tenant=tenant, urgency=urgency, requests=requests, tokens=tokens, weight=weight)


def view(*backlogs: Backlog, rate: float = 100.0, **more: object) -> QueueView:
    fields = {"backlogs": backlogs, "tokens_per_s": rate, "mean_tokens": 100.0, **more}
    return QueueView(**fields)  # type: ignore[arg-type]


BACKLOGS = st.lists(
    st.builds(
        backlog,
        st.sampled_from(["me", "a", "b", "c"]),
        st.floats(0, 1e6),
        urgency=st.integers(0, 2),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
    ),
    max_size=12,
    unique_by=lambda one: (one.tenant, one.urgency),
)


def test_a_tenant_waits_behind_itself_and_takes_turns_with_others() -> None:
    queue = view(backlog("me", 300), backlog("flood", 5000), backlog("small", 50))
    # Its own 300; the flood gets no more than this tenant's 400 meanwhile; all of the small one.
    assert tokens_ahead(ask(), queue) == 300 + 400 + 50
    assert tokens_ahead(ask("new"), queue) == 100 + 100 + 50
    assert decide(ask("new"), queue, max_requests=100).wait_s == 2.5


def test_a_tenant_of_more_weight_waits_less() -> None:
    queue = view(backlog("flood", 5000), backlog("big", 5000, weight=3.0))
    # While 100 tokens of weight 2 are served, 50 of the flood are, and 150 of the other.
    assert tokens_ahead(ask("new", weight=2.0), queue) == 50 + 150
    assert tokens_ahead(ask("new", weight=0.5), queue) == 200 + 600


@given(st.integers(16, 5000), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_parts_of_a_full_queue_follow_the_weights(most: int, weights: list[float]) -> None:
    parts = [share_of_queue(most, weight=weight, fleet_weight=sum(weights)) for weight in weights]
    assert sum(parts) <= most + len(parts)  # Everybody may hold one, however little it weighs.
    for weight, part in zip(weights, parts, strict=True):
        assert part == max(1, math.floor(most * weight / (sum(weights) + 1.0)))
        queue = view(fleet_requests=shared_from(most), tenant_requests=part, fleet_weight=sum(weights))
        refused = decide(ask(weight=weight), queue, max_requests=most)
        assert refused.refusal is Refusal.TENANT_SHARE
        if part > 1:
            queue = replace(queue, tenant_requests=part - 1)
            assert decide(ask(weight=weight), queue, max_requests=most).refusal is None


@given(
    BACKLOGS,
    st.floats(1, 1e5),
    st.floats(1, 1e4),
    st.floats(0.1, 1000),
    st.sampled_from([0.25, 1.0, 3.0]),
)
def test_nobody_is_admitted_to_wait_longer_than_its_class_may(
    backlogs: list[Backlog], rate: float, tokens: float, goal_s: float, weight: float
) -> None:
    wanted = ask(tokens=tokens, first_token_s=goal_s, weight=weight)
    verdict = decide(wanted, view(*backlogs, rate=rate), max_requests=10**6)
    if verdict.refusal is None:
        assert verdict.wait_s <= goal_s
        # At the bound it hands to the queue, one token below it the wait is still within the goal.
        own = sum(b.tokens for b in backlogs if b.tenant == "me" and b.urgency == 1)
        assert verdict.most_tokens >= own
        others = [b for b in backlogs if (b.tenant, b.urgency) != ("me", 1)]
        at_bound = view(*others, backlog("me", verdict.most_tokens * (1 - 1e-9)), rate=rate)
        assert decide(wanted, at_bound, max_requests=10**6).wait_s <= goal_s * (1 + 1e-6)
    else:
        assert verdict.refusal is Refusal.FIRST_TOKEN_GOAL and verdict.retry_after_s > 0
        assert verdict.reason


@given(st.integers(0, 200), st.integers(1, 100), st.integers(1, 20), st.data())
def test_the_queue_never_holds_more_than_its_bound(
    waiting: int, most: int, tenants: int, data: st.DataObject
) -> None:
    held = data.draw(st.integers(0, waiting))
    queue = view(fleet_requests=waiting, tenant_requests=held, fleet_weight=float(tenants))
    verdict = decide(ask(), queue, max_requests=most)
    if waiting >= most:
        assert verdict.refusal is Refusal.QUEUE_FULL
    elif waiting >= shared_from(most) and held >= share_of_queue(most, weight=1.0, fleet_weight=tenants):
        assert verdict.refusal is Refusal.TENANT_SHARE
    else:
        assert verdict.refusal is None
    assert (verdict.refusal is None) or verdict.retry_after_s > 0


@given(st.integers(16, 5000), st.integers(1, 8))
def test_a_flood_leaves_places_for_tenants_under_their_share(most: int, floods: int) -> None:
    held = dict.fromkeys(map(str, range(floods)), 0)
    progress = True
    while progress:
        progress = False
        for tenant in held:
            queue = view(fleet_requests=sum(held.values()), fleet_weight=floods, tenant_requests=held[tenant])
            room = shared_from(most) - sum(held.values())
            if decide(ask(tenant), queue, max_requests=most).refusal is None:
                held[tenant] += max(1, room // (2 * floods))  # as many as may pass at once without the bound
                progress = True
    newcomer = view(fleet_requests=sum(held.values()), fleet_weight=floods + 1)
    assert sum(held.values()) < most
    assert decide(ask("new"), newcomer, max_requests=most).refusal is None


@given(BACKLOGS, st.floats(1, 1e4))
def test_whoever_has_less_waiting_is_never_refused_before_whoever_has_more(
    others: list[Backlog], rate: float
) -> None:
    others = [replace(one, weight=1.0) for one in others]
    queue = view(*others, rate=rate)
    own = {name: sum(b.tokens for b in others if b.tenant == name and b.urgency == 1) for name in "abc"}
    light, heavy = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
    asks = [ask(name, first_token_s=5.0) for name in (light, heavy)]
    if decide(asks[0], queue, max_requests=10**6).refusal is not None:
        assert decide(asks[1], queue, max_requests=10**6).refusal is not None


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    queue = view(backlog("me", 300))
    hopeless = ask(serve_s=4.0, remaining_s=6.0)
    verdict = decide(hopeless, queue, max_requests=100)
    assert verdict.refusal is Refusal.DEADLINE and "7.0 s" in verdict.reason
    assert decide(replace(hopeless, remaining_s=8.0), queue, max_requests=100).refusal is None


def test_without_a_worker_requests_wait_as_long_as_their_class_may() -> None:
    gone = view(outage_s=3.0)
    assert decide(ask(first_token_s=10.0), gone, max_requests=100).refusal is None
    refused = decide(ask(first_token_s=2.0), gone, max_requests=100)
    assert (refused.refusal, refused.retry_after_s) == (Refusal.NO_WORKER, 3.0)


def test_a_brown_out_takes_batch_then_extras() -> None:
    batch = Ask(tenant="me", urgency=2, tokens=10, first_token_s=100)
    plain, extras = ask(), ask(extras=True)
    taken = {
        level: [decide(one, view(level=level), max_requests=9).refusal for one in (plain, extras, batch)]
        for level in Level
    }
    out = Refusal.BROWN_OUT
    assert taken[Level.NORMAL] == taken[Level.TRIMMED] == [None, None, None]
    assert taken[Level.SHEDDING] == [None, None, out]
    assert taken[Level.ESSENTIAL] == [None, out, out]


def test_pressure_is_the_wait_of_what_a_person_waits_for() -> None:
    queue = view(backlog("a", 100, urgency=0), backlog("b", 500), backlog("c", 10**6, urgency=2))
    assert pressure(queue, first_token_s=(10.0, 20.0, 1.0)) == 6.0 / 20.0
    assert pressure(queue, first_token_s=(2.0, 20.0, 1.0)) == 1.0 / 2.0


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.floats(0, 1.5)), min_size=1, max_size=200))
def test_brown_out_levels_change_one_by_one_and_never_in_haste(looks: list[tuple[float, float]]) -> None:
    state, now_s, changed_s = BrownOut(), 0.0, 0.0
    for gap_s, found in looks:
        now_s += gap_s
        after = step(state, pressure=found, now_s=now_s)
        moved = after.level - state.level
        assert abs(moved) <= 1
        if moved > 0:
            assert found >= RISE_ABOVE[state.level] and now_s - changed_s >= RISE_S
        if moved < 0:
            assert found < FALL_BELOW[after.level] and now_s - changed_s >= FALL_S
        if moved:
            changed_s = now_s
        state = after


@given(st.lists(st.floats(0.26, 0.49), min_size=1, max_size=50))
def test_between_the_thresholds_a_level_stays(pressures: list[float]) -> None:
    for level in (Level.NORMAL, Level.TRIMMED):
        state = BrownOut(level=level)
        for tick, found in enumerate(pressures):
            state = step(state, pressure=found, now_s=float(tick))
        assert state.level is level


def looks(
    rate: float, *, for_s: float, waiting: int, step_s: float = 0.25, start: Look | None = None
) -> list[Look]:
    """A queue that leaves in whole requests of 100 tokens at `rate` tokens per second."""
    first = start or Look(at_s=0.0, served_tokens=0, served_requests=0, waiting_requests=waiting, slots=4)
    rows = []
    for tick in range(1, int(for_s / step_s) + 1):
        served = int(tick * step_s * rate / 100)
        rows.append(
            Look(
                at_s=first.at_s + tick * step_s,
                served_tokens=first.served_tokens + 100 * served,
                served_requests=first.served_requests + served,
                waiting_requests=waiting,
                slots=4,
            )
        )
    return rows


def fed(rows: list[Look], rate: DrainRate | None = None) -> DrainRate:
    state = rate or DrainRate()
    for row in rows:
        state = observe(state, row)
    return state


@given(st.floats(50, 5000))
def test_the_rate_of_a_busy_queue_is_found(rate: float) -> None:
    found = fed(looks(rate, for_s=30, waiting=2000))
    assert found.is_known
    assert math.isclose(found.tokens_per_s, rate, rel_tol=0.35, abs_tol=30)
    assert found.mean_tokens == 100


def test_what_leaves_a_queue_that_runs_empty_says_nothing() -> None:
    assert not fed(looks(100, for_s=60, waiting=0)).is_known
    # Workers that fill their batch take a lump at once: more than had waited before.
    filling = [replace(row, waiting_requests=1) for row in looks(8000, for_s=10, waiting=1)]
    assert not fed(filling).is_known


def later(look: Look, *, s: float, served: int = 0, waiting: int = 500, slots: int = 4) -> Look:
    """The queue `s` seconds on, after so many requests of 100 tokens left."""
    return Look(
        at_s=look.at_s + s,
        served_tokens=look.served_tokens + 100 * served,
        served_requests=look.served_requests + served,
        waiting_requests=waiting,
        slots=slots,
    )


def test_the_rate_follows_workers_that_come_and_go() -> None:
    busy = fed(looks(400, for_s=30, waiting=500))
    assert busy.start is not None and busy.seen_s > ENOUGH_S
    halved = observe(busy, later(busy.start, s=0.25, served=1, slots=2, waiting=0))
    assert math.isclose(halved.tokens_per_s, busy.tokens_per_s / 2)


def test_a_stall_is_told_and_is_no_slow_rate() -> None:
    busy = fed(looks(400, for_s=30, waiting=500))
    assert busy.start is not None
    stalled = fed([later(busy.start, s=float(tick)) for tick in range(1, 30)], busy)
    assert stalled.stalled_s == 29.0
    assert fed([later(busy.start, s=float(tick)) for tick in range(1, 3)], busy).stalled_s == 0.0
    over = observe(stalled, later(busy.start, s=30.0, served=2))
    assert over.stalled_s == 0.0 and over.tokens_per_s == busy.tokens_per_s
    idle = fed([later(busy.start, s=float(tick), waiting=0) for tick in range(1, 30)], busy)
    assert idle.stalled_s == 0.0


def test_a_free_place_means_no_wait() -> None:
    queue = view(backlog("flood", 10**6, requests=3), free_places=4, rate=1.0)
    assert decide(ask("new"), queue, max_requests=100).wait_s == 0.0
    assert pressure(queue, first_token_s=(1.0, 1.0, 1.0)) == 0.0
    assert decide(ask("new"), replace(queue, free_places=3), max_requests=100).wait_s == 100.0


def test_counters_that_begin_anew_are_no_negative_rate() -> None:
    busy = fed(looks(400, for_s=10, waiting=500))
    fresh = Look(at_s=100.0, served_tokens=0, served_requests=0, waiting_requests=5, slots=4)
    assert observe(busy, fresh).tokens_per_s == busy.tokens_per_s


def test_no_two_clients_of_a_tenant_are_told_the_same_time() -> None:
    hints = RetryHints(shortest_s=1.0)
    told = [hints.next("t", room_in_s=2.0, takes_s=0.5, now_s=0.0, draw=0.0) for _ in range(4)]
    assert told == [2.0, 2.5, 3.0, 3.5]
    assert hints.next("other", room_in_s=2.0, takes_s=0.5, now_s=0.0, draw=0.0) == 2.0
    assert hints.next("t", room_in_s=0.0, takes_s=0.5, now_s=100.0, draw=0.0) == 1.0


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1)), max_size=60)
)
def test_hints_are_bounded(calls: list[tuple[int, float, float, float]]) -> None:
    hints = RetryHints(shortest_s=0.5)
    for number, (tenant, room_in_s, takes_s, draw) in enumerate(calls):
        hint = hints.next(str(tenant), room_in_s=room_in_s, takes_s=takes_s, now_s=float(number), draw=draw)
        assert 0.5 <= hint <= LONGEST_S


def test_promises_are_kept_for_so_many_tenants_only() -> None:
    hints = RetryHints(shortest_s=1.0)
    for number in range(MAX_TENANTS + 10):
        hints.next(str(number), room_in_s=5.0, takes_s=9.0, now_s=0.0, draw=0.0)
    assert hints.next("0", room_in_s=5.0, takes_s=9.0, now_s=0.0, draw=0.0) == 5.0
    assert hints.next(str(MAX_TENANTS), room_in_s=5.0, takes_s=9.0, now_s=0.0, draw=0.0) == 14.0


@dataclass
class ModelledFleet:
    """One server that works off tokens at a steady rate, tenants in turn, as the scheduler does."""

    rate: float
    goal_s: float
    queues: dict[str, list[float]] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    at_s: float = 0.0
    credit: float = 0.0

    def run_to(self, at_s: float) -> None:
        self.credit += (at_s - self.at_s) * self.rate
        self.at_s = at_s
        while self.queues:
            name = min(self.queues, key=lambda n: self.served.get(n, 0.0))
            if self.queues[name][0] > self.credit:
                return
            tokens = self.queues[name].pop(0)
            self.credit -= tokens
            self.served[name] = self.served.get(name, 0.0) + tokens
            if not self.queues[name]:
                del self.queues[name]
        self.credit = 0.0  # An idle server saves nothing up.

    def ask(self, tenant: str, tokens: float) -> Verdict:
        rows = [backlog(name, sum(queue), requests=len(queue)) for name, queue in self.queues.items()]
        verdict = decide(
            ask(tenant, tokens=tokens, first_token_s=self.goal_s),
            view(*rows, rate=self.rate),
            max_requests=10**6,
        )
        if verdict.refusal is None:
            if tenant not in self.queues:
                floor = min((self.served.get(name, 0.0) for name in self.queues), default=0.0)
                self.served[tenant] = max(self.served.get(tenant, 0.0), floor)
            self.queues.setdefault(tenant, []).append(tokens)
        return verdict


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(10, 300)), min_size=20, max_size=120))
def test_after_the_hinted_time_a_retry_is_admitted(calls: list[tuple[str, float]]) -> None:
    """As long as nobody else comes: any one refused client, at any state of the queue."""
    fleet = ModelledFleet(rate=100.0, goal_s=5.0)
    for tenant, tokens in calls:
        verdict = fleet.ask(tenant, tokens)
        if verdict.refusal is None:
            continue
        later = ModelledFleet(
            fleet.rate, fleet.goal_s, {n: list(q) for n, q in fleet.queues.items()}, dict(fleet.served)
        )
        # Requests are served as a whole, so each tenant may be one of them ahead of its turn.
        later.run_to(fleet.at_s + verdict.retry_after_s + 3 * 300 / fleet.rate)
        assert later.ask(tenant, tokens).refusal is None


def test_of_many_clients_that_obey_nearly_all_get_in_at_their_second_call() -> None:
    fleet, hints, rng = ModelledFleet(rate=100.0, goal_s=5.0), RetryHints(shortest_s=0.5), random.Random(3)
    calls = [(rng.uniform(0, 2), number, 1) for number in range(40)]  # 40 s of work within 2 s, one tenant
    heapq.heapify(calls)
    tries = []
    while calls:
        at_s, number, count = heapq.heappop(calls)
        fleet.run_to(at_s)
        verdict = fleet.ask("t", 100.0)
        if verdict.refusal is None:
            tries.append(count)
            continue
        hint_s = hints.next("t", room_in_s=verdict.retry_after_s, takes_s=1.0, now_s=at_s, draw=rng.random())
        heapq.heappush(calls, (at_s + hint_s, number, count + 1))
    assert len(tries) == 40
    assert sum(count <= 2 for count in tries) >= 36
    assert max(tries) <= 4
