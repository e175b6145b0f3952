"""Every scheduler, driven at random: blocks are conserved, work is, and levels only fall unless promoted.

`iteration_support.World` asserts at each step what any decision must keep: budgets, nobody named twice or
moved both ways, no victim that runs, no block with two owners, no idle batch beside one that could run.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.iteration_support import World, linear_profile
from trireme.policies.iteration import Location
from trireme.policies.mlfq import MlfqScheduler, MlfqSettings
from trireme.policies.schedulers import POLICIES, make_scheduler


class Machine(RuleBasedStateMachine):
    """Arrivals, cancels, lost KV, copies that take several iterations."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        device=st.integers(12, 60),
        host=st.sampled_from([0, 4, 20, 200]),
        max_sequences=st.integers(1, 6),
        token_budget=st.integers(6, 40),
        watermark=st.integers(0, 3),
        copy_steps=st.integers(1, 4),
        alpha_s=st.sampled_from([0.0, 3.0, 20.0, math.inf]),
        promote_period=st.sampled_from([1, 5, 20]),
        enst_v2=st.booleans(),
        proactive=st.booleans(),
    )
    def start(self, policy: str, device: int, host: int, **knobs: Any) -> None:
        self.policy = policy
        chosen = MlfqSettings(
            **{name: knobs.pop(name) for name in ("alpha_s", "promote_period", "enst_v2", "proactive")}
        )
        scheduler = make_scheduler(
            policy, linear_profile(), settings=chosen, remaining=lambda name: self.world.remaining(name)
        )
        self.world = World(scheduler, device=device, host=host, **knobs)
        self.names = 0
        self.levels: dict[str, int] = {}
        self.promotions: list[int] = []
        self.chosen = chosen

    @rule(
        prompt=st.integers(1, 30), answer=st.integers(1, 18), priority=st.integers(0, 2), shared=st.booleans()
    )
    def arrive(self, prompt: int, answer: int, priority: int, shared: bool) -> None:
        name = f"{self.names:03}"
        self.names += 1
        scheduler = self.world.scheduler
        assert self.world.add(name, prompt, answer, priority=priority)
        self.world.sequences[name].next_block = b"shared" if shared else None
        if isinstance(scheduler, MlfqScheduler):
            level = self.levels[name] = scheduler.level_of(name)
            if self.policy == "mlfq":
                assert scheduler.quanta_s[level] >= prompt > scheduler.quanta_s[level - 1] or level == 1
            else:
                assert level == 1

    @rule(count=st.integers(1, 8))
    def iterate(self, count: int) -> None:
        for _ in range(count):
            decision = self.world.step()
            self.promotions += [len(self.world.decisions)] * len(decision.promoted)
            for name, old, new, reason in decision.promoted:
                assert new == 1 < old == self.levels[name] and reason
                self.levels[name] = new
            for name, old, new, reason in self.world.changes:
                assert self.levels[name] == old < new and reason
                self.levels[name] = new
            self.world.changes.clear()

    @precondition(lambda self: self.world.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.sequences))))

    @precondition(lambda self: self.world.sequences)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A copy failed, or a checksum was wrong."""
        sequence = self.world.sequences[data.draw(st.sampled_from(sorted(self.world.sequences)))]
        if sequence.location in (Location.DEVICE, Location.HOST):
            self.world.free += sequence.blocks
            self.world.host_free += sequence.host_blocks
            sequence.blocks = sequence.host_blocks = sequence.computed = 0
            sequence.location = Location.NONE

    @invariant()
    def everybody_is_in_one_place(self) -> None:
        world = self.world
        waiting = list(world.scheduler.order())
        assert len(waiting) == len(set(waiting)) and set(waiting) <= world.sequences.keys()
        running = world.sequences.keys() - set(waiting)
        assert all(world.scheduler.next_use_s(name, now_s=world.now_s) == 0.0 for name in running)
        assert all(world.scheduler.next_use_s(name, now_s=world.now_s) >= 0.0 for name in waiting)

    @invariant()
    def levels_are_counted(self) -> None:
        scheduler = self.world.scheduler
        if isinstance(scheduler, MlfqScheduler):
            counted = [0] * len(scheduler.level_counts)
            for name in self.world.sequences:
                assert scheduler.level_of(name) == self.levels[name]
                counted[self.levels[name] - 1] += 1
            assert tuple(counted) == scheduler.level_counts

    @invariant()
    def promotions_keep_their_rate(self) -> None:
        period, most = self.chosen.promote_period, self.chosen.promote_max
        for start in self.promotions:
            assert sum(start <= at < start + period for at in self.promotions) <= most

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run(most=20_000)
            assert not list(self.world.scheduler.order())
            while self.world.copies:
                self.world._advance_copies()
            assert self.world.free == self.world.device and self.world.host_free == self.world.host


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase


WORKLOAD = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=15
)
"""(prompt, answer, iterations until the next arrival)"""


def played(world: World, workload: list[tuple[int, int, int]]) -> World:
    for number, (prompt, answer, iterations) in enumerate(workload):
        world.add(f"{number:02}", prompt, answer)
        for _ in range(iterations):
            if world.sequences:
                world.step()
    world.run()
    return world


@given(WORKLOAD, st.integers(1, 5), st.integers(8, 64))
@settings(deadline=None)
def test_with_one_endless_quantum_mlfq_is_first_come_first_served(
    workload: list[tuple[int, int, int]], max_sequences: int, token_budget: int
) -> None:
    endless = MlfqSettings(quantum_s=1e9, alpha_s=math.inf)
    runs = [
        [
            dict(decision.runs)
            for decision in played(
                World(scheduler, max_sequences=max_sequences, token_budget=token_budget), workload
            ).decisions
        ]
        for scheduler in (MlfqScheduler(linear_profile(), endless), make_scheduler("fcfs"))
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("policy", POLICIES)
@given(workload=WORKLOAD, max_sequences=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_with_unlimited_memory_nothing_moves(
    policy: str, workload: list[tuple[int, int, int]], max_sequences: int
) -> None:
    worlds: list[World] = []
    scheduler = make_scheduler(policy, linear_profile(), remaining=lambda name: worlds[0].remaining(name))
    worlds.append(World(scheduler, device=10**6, max_sequences=max_sequences))
    world = played(worlds[0], workload)
    assert all(not (d.swap_out or d.swap_in or d.evicted or d.waits_for_copies) for d in world.decisions)
    assert world.recomputed == 0


@pytest.mark.parametrize("policy", POLICIES)
@given(workload=WORKLOAD, max_sequences=st.integers(1, 5), copy_steps=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_with_a_large_host_nothing_is_computed_twice(
    policy: str, workload: list[tuple[int, int, int]], max_sequences: int, copy_steps: int
) -> None:
    worlds: list[World] = []
    scheduler = make_scheduler(policy, linear_profile(), remaining=lambda name: worlds[0].remaining(name))
    worlds.append(World(scheduler, device=24, max_sequences=max_sequences, copy_steps=copy_steps))
    world = played(worlds[0], workload)
    assert world.recomputed == 0 and not any(decision.evicted for decision in world.decisions)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_iterations_played_as_one_give_the_same_schedule(policy: str, seed: int) -> None:
    """`steady` is a promise: whoever skips the decisions that it covers ends up where others do."""
    ends: list[dict[str, float | None]] = []
    asked: list[int] = []
    for skips in (False, True):
        worlds: list[World] = []
        scheduler = make_scheduler(
            policy,
            linear_profile(),
            settings=MlfqSettings(alpha_s=50.0),
            remaining=lambda name, worlds=worlds: worlds[0].remaining(name),  # type: ignore[misc]
        )
        world = World(scheduler, device=60, max_sequences=4, token_budget=32)
        worlds.append(world)
        rng = random.Random(seed)
        for number in range(25):
            world.add(f"{number:02}", rng.randrange(1, 60), rng.randrange(1, 80))
            for _ in range(rng.randrange(0, 3)):
                world.step()
        world.skips = skips
        world.run()
        ends.append({name: sequence.finish_s for name, sequence in world.done.items()})
        asked.append(len(world.decisions))
    assert ends[0] == ends[1]
    assert asked[1] < asked[0]
