"""First come first served, and priority: urgent work goes first, and nobody that fits is starved."""

from __future__ import annotations

import pytest

from tests.unit.iteration_support import World
from trireme.policies.arrival_order import ArrivalOrderScheduler
from trireme.policies.iteration import Budget, IterationDecision, Job, Location, SequenceView


class Bench:
    """A scheduler and the views that it is given; what a decision starts is noted as running."""

    def __init__(self, *, by_priority: bool) -> None:
        self.scheduler = ArrivalOrderScheduler(by_priority=by_priority)
        self.views: dict[str, SequenceView] = {}

    def waiting(
        self,
        name: str,
        arrival_s: float = 0.0,
        *,
        tokens: int = 10,
        blocks: int = 1,
        priority: int = 0,
        next_block: bytes | None = None,
        pending: bool = False,
        location: Location = Location.NONE,
    ) -> None:
        job = Job(sequence_id=name, arrival_s=arrival_s, priority=priority, new_tokens=tokens)
        self.scheduler.add(job, now_s=0.0)
        self.views[name] = SequenceView(tokens, blocks, 0, location, next_block, pending)

    def running(
        self,
        name: str,
        arrival_s: float = 0.0,
        *,
        tokens: int = 1,
        blocks: int = 0,
        held: int = 4,
        priority: int = 0,
        location: Location = Location.DEVICE,
    ) -> None:
        """Let it be admitted alone, then look as told."""
        elsewhere = self.views.copy()
        for other in elsewhere:
            self.views[other] = SequenceView(1, 10**9, 0, Location.MOVING)
        self.waiting(name, arrival_s, tokens=1, blocks=0, priority=priority)
        assert self.decide(slots=1000, free=0).admitted == {name}
        self.views |= elsewhere
        self.views[name] = SequenceView(tokens, blocks, held, location)

    def decide(
        self,
        *,
        tokens: int = 32,
        slots: int = 8,
        free: int = 100,
        draining: int = 0,
        host: int = 0,
        watermark: int = 0,
        max_passes: int = 3,
    ) -> IterationDecision:
        budget = Budget(
            token_budget=tokens,
            max_sequences=slots,
            free_blocks=free,
            draining_blocks=draining,
            host_free_blocks=host,
            host_blocks=host,
            watermark_blocks=watermark,
            max_passes=max_passes,
        )
        return self.scheduler.decide(budget, self.views.__getitem__, now_s=0.0)


BOTH = pytest.mark.parametrize("by_priority", [False, True], ids=["fcfs", "priority"])


@BOTH
def test_decoding_comes_first_and_prefill_takes_the_rest_in_chunks(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("prefill", 1.0, tokens=20)
    bench.running("a", 2.0)
    bench.running("b", 0.0)
    bench.waiting("new", 3.0, tokens=50)
    decision = bench.decide(tokens=30)
    assert dict(decision.runs) == {"b": 1, "a": 1, "prefill": 20, "new": 8}
    assert decision.admitted == {"new"}


def three_that_run(by_priority: bool) -> Bench:
    bench = Bench(by_priority=by_priority)
    bench.running("old", 0.0, blocks=1)
    bench.running("mid", 1.0)
    bench.running("late", 2.0)
    assert len(bench.decide(free=100).runs) == 3
    bench.waiting("new", 0.5)
    return bench


@BOTH
def test_without_a_host_a_block_is_taken_from_the_latest_at_once(by_priority: bool) -> None:
    decision = three_that_run(by_priority).decide(free=0)
    assert [name for name, _ in decision.evicted] == ["late"]
    assert dict(decision.runs) == {"old": 1, "mid": 1}
    assert "old needs 1 blocks" in decision.evicted[0].reason


@BOTH
def test_with_a_host_the_latest_is_copied_out_and_its_block_is_waited_for(by_priority: bool) -> None:
    bench = three_that_run(by_priority)
    decision = bench.decide(free=0, host=4)
    assert [name for name, _ in decision.swap_out] == ["late"] and not decision.evicted
    assert dict(decision.runs) == {"mid": 1}
    assert [name for name, _ in decision.paused] == ["old"] and "copied out" in decision.paused[0].reason
    assert not decision.admitted and not decision.waits_for_copies
    bench.views["late"] = bench.views["late"]._replace(location=Location.MOVING)
    meanwhile = bench.decide(free=0, draining=4)
    assert dict(meanwhile.runs) == {"mid": 1} and not meanwhile.swap_out and not meanwhile.evicted
    bench.views["late"] = SequenceView(1, 5, 0, Location.HOST)
    later = bench.decide(free=4, host=4)
    assert dict(later.runs) == {"old": 1, "mid": 1, "new": 10} and not later.swap_in


@BOTH
def test_alone_it_waits_for_the_copies(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("old", 0.0, blocks=1)
    decision = bench.decide(free=0, draining=4)
    assert dict(decision.runs) == {"old": 1} and decision.waits_for_copies


@BOTH
def test_one_on_the_host_comes_back_in_its_place_of_the_order(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("a", 0.0)
    bench.waiting("back", 1.0, tokens=1, blocks=5, location=Location.HOST)
    bench.waiting("new", 2.0, blocks=6)
    short = bench.decide(free=4, max_passes=0)
    assert dict(short.runs) == {"a": 1} and not short.swap_in
    first = bench.decide(free=6)
    assert first.swap_in == ("back",) and dict(first.runs) == {"a": 1}
    bench.views["back"] = bench.views["back"]._replace(location=Location.MOVING)
    assert dict(bench.decide(free=1).runs) == {"a": 1}
    bench.views["back"] = SequenceView(1, 0, 5, Location.DEVICE)
    assert dict(bench.decide(free=1).runs) == {"a": 1, "back": 1}


@BOTH
def test_a_sequence_that_is_the_latest_preempts_itself(by_priority: bool) -> None:
    for host in (0, 10):
        bench = Bench(by_priority=by_priority)
        bench.running("old")
        bench.running("late", 2.0, blocks=1)
        decision = bench.decide(free=0, host=host)
        assert [name for name, _ in decision.swap_out or decision.evicted] == ["late"]
        assert dict(decision.runs) == {"old": 1}


@BOTH
def test_a_small_sequence_passes_a_large_one_but_not_for_ever(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("x")
    bench.waiting("large", 0.0, blocks=50)
    for number in range(3):
        bench.waiting(f"small{number}", 1.0, blocks=2)
        decision = bench.decide(free=10)
        assert decision.admitted == {f"small{number}"} and decision.passed == ("large",)
        bench.views[f"small{number}"] = SequenceView(1, 0, 2, Location.DEVICE)
    bench.waiting("small", 1.0, blocks=2)
    decision = bench.decide(free=10)
    assert decision.admitted == set() and decision.passed == ()
    assert bench.decide(free=60).admitted == {"large", "small"}


@BOTH
def test_one_that_was_passed_by_nobody_does_not_count_it(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("x")
    bench.waiting("large", blocks=50)
    assert bench.decide(free=10).passed == ()


@BOTH
def test_the_watermark_is_left_free_unless_nothing_runs(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("x")
    bench.waiting("new", blocks=9)
    assert not bench.decide(free=10, watermark=2).admitted
    bench.scheduler.remove("x")
    assert bench.decide(free=10, watermark=2).admitted == {"new"}


@BOTH
def test_a_shared_block_is_computed_once(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.waiting("first", 0.0, next_block=b"same")
    bench.waiting("second", 1.0, next_block=b"same")
    bench.waiting("third", 2.0, next_block=b"other", pending=True)
    bench.waiting("fourth", 3.0, next_block=b"own")
    decision = bench.decide()
    assert decision.admitted == {"first", "fourth"} and decision.passed == ()


def test_priority_goes_before_arrival_under_priority_only() -> None:
    for by_priority, first in [(False, "early"), (True, "urgent")]:
        bench = Bench(by_priority=by_priority)
        bench.waiting("early", 0.0)
        bench.waiting("urgent", 1.0, priority=5)
        assert next(bench.scheduler.order()) == first
        assert bench.decide(slots=1).admitted == {first}


def urgent_beside_three(blocks: int, *, by_priority: bool = True) -> Bench:
    bench = Bench(by_priority=by_priority)
    bench.running("a", 0.0)
    bench.running("b", 1.0)
    bench.running("c", 2.0, priority=9)
    bench.waiting("urgent", 5.0, priority=5, blocks=blocks)
    return bench


def test_the_urgent_take_over_slots_and_blocks_from_as_few_as_needed() -> None:
    by_slot = urgent_beside_three(3).decide(slots=3)
    assert [name for name, _ in by_slot.evicted] == ["b"]
    assert dict(by_slot.runs) == {"c": 1, "a": 1, "urgent": 10}
    by_blocks = urgent_beside_three(7).decide(free=0)
    assert {name for name, _ in by_blocks.evicted} == {"a", "b"}
    assert not urgent_beside_three(9).decide(free=0).evicted
    assert not urgent_beside_three(3, by_priority=False).decide(slots=3).evicted


def test_those_taken_over_are_copied_out_and_the_urgent_runs_when_their_blocks_are_free() -> None:
    bench = urgent_beside_three(7)
    decision = bench.decide(free=0, host=100)
    assert {name for name, _ in decision.swap_out} == {"a", "b"} and not decision.admitted
    assert dict(decision.runs) == {"c": 1}
    for name in "ab":
        bench.views[name] = SequenceView(1, 4, 0, Location.MOVING)
    waits = bench.decide(free=0, draining=8, host=92)
    assert not waits.swap_out and not waits.admitted
    assert bench.decide(free=8, host=92).admitted == {"urgent"}


@BOTH
def test_next_use_counts_those_ahead(by_priority: bool) -> None:
    world = World(ArrivalOrderScheduler(by_priority=by_priority), max_sequences=1)
    for number in range(6):
        world.add(f"{number}", 1, 4)
    for _ in range(9):
        world.step()
    waits_s = [world.scheduler.next_use_s(f"{number}", now_s=world.now_s) for number in (2, 3, 4, 5)]
    assert waits_s == [0.0, 0.0, pytest.approx(4.0), pytest.approx(8.0)]
    assert world.scheduler.next_use_s("nobody", now_s=0.0) == float("inf")
    assert list(world.scheduler.order()) == ["3", "4", "5"]


@BOTH
def test_one_whose_kv_was_lost_waits_again_in_its_place(by_priority: bool) -> None:
    bench = Bench(by_priority=by_priority)
    bench.running("lost", 0.0)
    bench.waiting("new", 1.0)
    bench.views["lost"] = SequenceView(40, 3, 0, Location.NONE)
    decision = bench.decide(tokens=40)
    assert dict(decision.runs) == {"lost": 40} and decision.admitted == {"lost"}
