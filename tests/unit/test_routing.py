"""choose_worker: the least expected finish time, never a full worker, never without a reason."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from trireme.policies.routing import (
    RoutedRequest,
    WorkerView,
    choose_worker,
    estimate,
    has_room,
)


def request(
    *, request_id: str = "r", prompt: int = 100, answer: float = 50, avoid: frozenset[str] = frozenset()
) -> RoutedRequest:
    return RoutedRequest(
        request_id=request_id,
        prompt_tokens=prompt,
        expected_answer_tokens=answer,
        choices=1,
        urgency=1,
        avoid_worker_ids=avoid,
    )


def worker(
    name: str, *, assigned: int = 0, cached: int = 0, decode: float = 100.0, limit: int = 2
) -> WorkerView:
    return WorkerView(
        worker_id=name,
        variant="v",
        assigned_requests=assigned,
        assigned_tokens=assigned * 150,
        running=min(assigned, 4),
        max_sequences=4,
        queue_limit=limit,
        prefill_tokens_per_s=1000.0,
        decode_tokens_per_s=decode,
        cached_tokens=cached,
    )


views = st.builds(
    WorkerView,
    worker_id=st.text("abcdefgh", min_size=1, max_size=4),
    variant=st.just("v"),
    assigned_requests=st.integers(0, 12),
    assigned_tokens=st.integers(0, 100_000),
    running=st.integers(0, 8),
    max_sequences=st.integers(1, 8),
    queue_limit=st.integers(0, 4),
    prefill_tokens_per_s=st.floats(0, 1e5),
    decode_tokens_per_s=st.floats(0, 1e4),
    cached_tokens=st.integers(0, 100),
)


def test_where_long_ones_make_way_a_short_one_waits_for_no_more_than_its_own_service_from_each() -> None:
    short, long = request(prompt=10, answer=10), request(prompt=1000, answer=1000)
    patient = worker("a", assigned=8, limit=8)
    preemptive = dataclasses.replace(patient, preemptive=True)
    assert estimate(short, preemptive).queue_s < estimate(short, patient).queue_s
    assert estimate(long, preemptive).queue_s == estimate(long, patient).queue_s
    fuller = dataclasses.replace(preemptive, assigned_requests=12, assigned_tokens=12 * 150)
    assert estimate(short, fuller).queue_s > estimate(short, preemptive).queue_s


def test_an_idle_fleet_sends_a_prompt_to_the_worker_that_holds_its_prefix() -> None:
    choice = choose_worker(request(), [worker("a"), worker("b", cached=96), worker("c")])
    assert choice is not None
    assert choice.worker_id == "b"
    assert choice.cached_tokens == 96
    assert "96 of 100 tokens cached" in choice.reason


def test_a_cached_prefix_does_not_outweigh_a_long_queue() -> None:
    # Four are in the batch and one waits: at least a mean request's time must pass first.
    busy = worker("busy", assigned=5, cached=96)
    choice = choose_worker(request(), [busy, worker("idle")])
    assert choice is not None
    assert choice.worker_id == "idle"


def test_equal_workers_share_requests_evenly() -> None:
    counts = {"a": 0, "b": 0, "c": 0}
    for number in range(600):
        choice = choose_worker(request(request_id=f"r{number}"), [worker(name) for name in counts])
        assert choice is not None
        counts[choice.worker_id] += 1
    assert min(counts.values()) > 150


def test_a_worker_that_just_failed_the_request_is_used_only_if_alone() -> None:
    avoid = frozenset({"a"})
    both = choose_worker(request(avoid=avoid), [worker("a", cached=96), worker("b", assigned=3)])
    alone = choose_worker(request(avoid=avoid), [worker("a")])
    assert both is not None and both.worker_id == "b"
    assert alone is not None and alone.worker_id == "a"


def test_the_wait_for_a_slot_follows_from_the_work_ahead() -> None:
    # 4 run at 100 tokens/s each; 2 more wait, so with this one 3 requests of 150 tokens are ahead of a slot.
    expected = estimate(request(), worker("a", assigned=6))
    assert expected.queue_s == 3 * 150 / (100 * 4)
    assert expected.prefill_s == 0.1
    assert expected.decode_s == 0.5


def test_a_rate_that_is_no_rate_gives_a_time_all_the_same() -> None:
    for rate in (5e-324, float("nan"), float("inf"), -1.0):
        expected = estimate(request(), worker("a", assigned=6, decode=rate))
        assert 0 <= expected.finish_s < float("inf")


def test_a_request_waits_for_room_rather_than_go_back_to_the_worker_that_failed_it() -> None:
    full = worker("full", assigned=6, limit=2)
    assert choose_worker(request(avoid=frozenset({"a"})), [worker("a"), full]) is None


@given(st.lists(views, max_size=8))
def test_nobody_without_room_is_chosen_and_somebody_is_if_there_is_room(all_views: list[WorkerView]) -> None:
    choice = choose_worker(request(), all_views)
    open_views = [view for view in all_views if has_room(view)]
    assert (choice is None) == (not open_views)
    if choice is not None:
        best = min(estimate(request(), view).finish_s for view in open_views)
        assert choice.estimates[0].finish_s <= best + 1e-6
        assert len(choice.estimates) == len(open_views)


@given(st.lists(views, min_size=1, max_size=6), st.randoms())
def test_the_order_of_the_views_does_not_matter(all_views: list[WorkerView], random: object) -> None:
    distinct = [dataclasses.replace(view, worker_id=f"w{i}") for i, view in enumerate(all_views)]
    shuffled = list(distinct)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = choose_worker(request(), distinct), choose_worker(request(), shuffled)
    assert (one and one.worker_id) == (other and other.worker_id)
