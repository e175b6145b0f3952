"""A small engine for iteration schedulers: block pools, copies that take time, and every rule checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trireme.policies.iteration import (
    Budget,
    IterationDecision,
    IterationScheduler,
    Job,
    LevelChange,
    Location,
    Run,
    SequenceView,
)
from trireme.policies.iteration_profile import DecodePoint, IterationProfile, PrefillPoint


@dataclass(slots=True, eq=False)
class Sequence:
    name: str
    arrival_s: float
    prompt: int
    answer: int
    priority: int = 0
    next_block: bytes | None = None
    location: Location = Location.NONE
    computed: int = 0
    most_computed: int = 0
    answered: int = 0
    blocks: int = 0
    host_blocks: int = 0
    finish_s: float | None = None

    @property
    def target(self) -> int:
        return self.prompt + self.answered


@dataclass(slots=True, eq=False)
class Copy:
    sequence: Sequence
    to: Location
    steps: int


def linear_profile(second_per_token: float = 1.0, decode_s: float = 1.0) -> IterationProfile:
    """A prompt of n tokens takes n units, a decode iteration one, whatever the batch and the context."""
    return IterationProfile(
        tuple(PrefillPoint(n, 0, n * second_per_token) for n in (1, 2, 4, 1024)),
        tuple(DecodePoint(batch, 1, decode_s) for batch in (1, 2, 4, 64)),
    )


def serial_cost(world: World, runs: tuple[Run, ...]) -> float:
    """Each token of a chunk takes a unit, and so do all single tokens together."""
    chunks = sum(count for _, count in runs if count > 1)
    return float(chunks + any(count == 1 for _, count in runs))


class World:
    """Drives a scheduler. `step` asserts everything that a decision promises."""

    def __init__(
        self,
        scheduler: IterationScheduler,
        *,
        device: int = 10_000,
        host: int = 10_000,
        block_size: int = 4,
        token_budget: int = 4096,
        max_sequences: int = 64,
        watermark: int = 0,
        max_passes: int = 3,
        copy_steps: int = 1,
        cost: Callable[[World, tuple[Run, ...]], float] = serial_cost,
    ) -> None:
        self.scheduler = scheduler
        self.device = device
        self.host = host
        self.free = device
        self.draining = 0
        self.host_free = host
        self.block_size = block_size
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.watermark = watermark
        self.max_passes = max_passes
        self.copy_steps = copy_steps
        self.cost = cost
        self.skips = False
        """Play as many iterations as one as the scheduler says are alike."""
        self.now_s = 0.0
        self.sequences: dict[str, Sequence] = {}
        self.done: dict[str, Sequence] = {}
        self.copies: list[Copy] = []
        self.batch: set[str] = set()
        self.changes: list[LevelChange] = []
        self.promotions: list[int] = []
        """Iterations in which somebody was promoted, once per promotion."""
        self.decisions: list[IterationDecision] = []
        self.most_admitted = 0
        """Blocks that new prompts took in one iteration, at most."""
        self.recomputed = 0
        self.copied_out = 0

    def add(
        self, name: str, prompt: int, answer: int, *, priority: int = 0, arrival_s: float | None = None
    ) -> str:
        arrival_s = self.now_s if arrival_s is None else arrival_s
        self.sequences[name] = Sequence(name, arrival_s, prompt, answer, priority)
        return self.scheduler.add(
            Job(sequence_id=name, arrival_s=arrival_s, priority=priority, new_tokens=prompt), now_s=self.now_s
        )

    def cancel(self, name: str) -> None:
        self._end(self.sequences[name])

    def remaining(self, name: str) -> float:
        sequence = self.sequences[name]
        return sequence.target - sequence.computed + sequence.answer - sequence.answered - 1

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def view(self, name: str) -> SequenceView:
        sequence = self.sequences[name]
        on_device = sequence.location is Location.DEVICE
        needed = self.blocks_for(sequence.target)
        next_block = sequence.next_block if sequence.location is Location.NONE else None
        return SequenceView(
            num_tokens=sequence.target - sequence.computed,
            num_blocks=needed - sequence.blocks if on_device else needed,
            held_blocks=sequence.blocks if on_device else 0,
            location=sequence.location,
            next_block=next_block,
            is_block_pending=next_block is not None
            and any(
                other.next_block == next_block
                and other.location is Location.DEVICE
                and other.computed < other.prompt
                for other in self.sequences.values()
            ),
        )

    def budget(self) -> Budget:
        return Budget(
            token_budget=self.token_budget,
            max_sequences=self.max_sequences,
            free_blocks=self.free,
            draining_blocks=self.draining,
            host_free_blocks=self.host_free,
            host_blocks=self.host,
            watermark_blocks=self.watermark,
            max_passes=self.max_passes,
        )

    def step(self) -> IterationDecision:
        """One iteration: decide, move, compute, charge."""
        self._advance_copies()
        views = {name: self.view(name) for name in self.sequences}
        decision = self.scheduler.decide(self.budget(), self.view, now_s=self.now_s)
        self.decisions.append(decision)
        self._check(decision, views)
        self._apply(decision)
        self._check_pools()
        if not decision.runs:
            if self.sequences and not self.copies:
                raise AssertionError(f"nobody runs: {decision.reason}")
            return decision
        iterations = self._alike(decision) if self.skips else 1
        seconds = iterations * self.cost(self, decision.runs)
        self.now_s += seconds
        for name, count in decision.runs:
            self._compute(self.sequences[name], count + iterations - 1)
            self.sequences[name].answered += iterations - 1
        self.changes += self.scheduler.charge(decision.runs, seconds, now_s=self.now_s, iterations=iterations)
        for name, _ in decision.runs:
            sequence = self.sequences[name]
            if sequence.answered == sequence.answer:
                sequence.finish_s = self.now_s
                self.done[name] = sequence
                self._end(sequence)
        self.batch = {name for name, _ in decision.runs} & self.sequences.keys()
        return decision

    def _alike(self, decision: IterationDecision) -> int:
        """Iterations that need no other decision."""
        steady = self.scheduler.steady()
        members = [self.sequences[name] for name, _ in decision.runs]
        if steady.blocks < 0 or any(sequence.target - sequence.computed > 1 for sequence in members):
            return 1
        most = min(sequence.answer - sequence.answered for sequence in members)
        most = int(min(most, max(1.0, steady.iterations), max(1.0, math.ceil(min(steady.seconds, most)))))
        while most > 1:
            grown = [self.blocks_for(each.target + most - 1) - each.blocks for each in members]
            if sum(grown) <= min(steady.blocks, self.free):
                for sequence, blocks in zip(members, grown, strict=True):
                    sequence.blocks += blocks
                    self.free -= blocks
                return most
            most -= 1
        return 1

    def run(self, most: int = 100_000) -> None:
        """Until everybody is done."""
        for _ in range(most):
            if not self.sequences:
                return
            self.step()
        raise AssertionError(f"{len(self.sequences)} sequences are not done after {most} iterations")

    def _check(self, decision: IterationDecision, views: dict[str, SequenceView]) -> None:
        runs = dict(decision.runs)
        moves = [
            [name for name, _ in decision.paused],
            [name for name, _ in decision.swap_out],
            list(decision.swap_in),
            [name for name, _ in decision.evicted],
            list(runs),
        ]
        named = [name for group in moves for name in group]
        assert len(named) == len(set(named)), f"named twice: {decision}"
        assert len(runs) == len(decision.runs) <= self.max_sequences
        assert sum(runs.values()) <= self.token_budget
        for name, count in runs.items():
            assert 1 <= count <= views[name].num_tokens
            assert views[name].location in (Location.DEVICE, Location.NONE)
        assert decision.admitted == {name for name in runs if views[name].location is Location.NONE}
        for name, reason in decision.paused:
            # Nobody need look at one that is paused, so its KV may be lost without being missed yet.
            assert name in self.batch and views[name].location in (Location.DEVICE, Location.NONE) and reason
        for name, reason in (*decision.swap_out, *decision.evicted):
            assert views[name].location is Location.DEVICE and reason
        for name in decision.swap_in:
            assert views[name].location is Location.HOST
        out = sum(views[name].held_blocks for name, _ in decision.swap_out)
        assert out <= self.host_free
        # No more leave than one batch, the reserve and the size of one victim can account for.
        needed = sorted([view.num_blocks for view in views.values()], reverse=True)[: self.max_sequences]
        largest = max((view.held_blocks for view in views.values()), default=0)
        assert out <= sum(needed) + self.max_sequences + self.most_admitted + largest
        now = self.free + sum(views[name].held_blocks for name, _ in decision.evicted)
        needs = [views[name].num_blocks for name in (*runs, *decision.swap_in)]
        if decision.waits_for_copies:
            now += self.draining + out
            assert len(runs) + len(decision.swap_in) >= 1
        assert sum(needs) <= now, f"{needs} of {now}: {decision.reason}"
        admitted = sum(views[name].num_blocks for name in decision.admitted)
        self.most_admitted = max(self.most_admitted, admitted)
        for name in decision.passed:
            assert name not in runs and views[name].location is not Location.DEVICE
        gone = {name for name, _ in decision.swap_out}
        ready = [
            name
            for name, view in views.items()
            if view.location is Location.DEVICE and view.num_blocks == 0 and name not in gone
        ]
        assert runs or not ready, f"{ready} could run: {decision.reason}"

    def _apply(self, decision: IterationDecision) -> None:
        for name, _ in decision.evicted:
            sequence = self.sequences[name]
            self.free += sequence.blocks
            sequence.blocks = sequence.computed = 0
            sequence.location = Location.NONE
        for name, _ in decision.swap_out:
            sequence = self.sequences[name]
            sequence.location = Location.MOVING
            sequence.host_blocks = sequence.blocks
            self.host_free -= sequence.blocks
            self.draining += sequence.blocks
            self.copied_out += 1
            self.copies.append(Copy(sequence, Location.HOST, self.copy_steps))
        if decision.waits_for_copies:
            while self.draining:
                self._advance_copies()
        for name in decision.swap_in:
            sequence = self.sequences[name]
            sequence.location = Location.MOVING
            sequence.blocks = self.blocks_for(sequence.target)
            self.free -= sequence.blocks
            self.copies.append(Copy(sequence, Location.DEVICE, self.copy_steps))
        for name, _ in decision.runs:
            sequence = self.sequences[name]
            missing = self.blocks_for(sequence.target) - sequence.blocks
            sequence.blocks += missing
            self.free -= missing
            sequence.location = Location.DEVICE

    def _compute(self, sequence: Sequence, count: int) -> None:
        end = sequence.computed + count
        self.recomputed += max(0, min(sequence.most_computed, end) - sequence.computed)
        sequence.computed = end
        sequence.most_computed = max(sequence.most_computed, end)
        if end >= sequence.target:
            sequence.answered += 1

    def _advance_copies(self) -> None:
        for copy in self.copies:
            copy.steps -= 1
            sequence = copy.sequence
            if copy.steps > 0:
                continue
            if copy.to is Location.HOST:
                self.draining -= sequence.host_blocks
                self.free += sequence.host_blocks
                sequence.blocks = 0
            else:
                self.host_free += sequence.host_blocks
                sequence.host_blocks = 0
            sequence.location = copy.to
            if sequence.name not in self.sequences:
                self._give_back(sequence)
        self.copies = [copy for copy in self.copies if copy.steps > 0]

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence.name)
        del self.sequences[sequence.name]
        self.batch.discard(sequence.name)
        if sequence.location is not Location.MOVING:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.free += sequence.blocks
        self.host_free += sequence.host_blocks
        sequence.blocks = sequence.host_blocks = 0
        sequence.location = Location.NONE

    def _check_pools(self) -> None:
        """Every block has one owner."""
        moving_out = [copy.sequence for copy in self.copies if copy.to is Location.HOST]
        known = {*self.sequences.values(), *(copy.sequence for copy in self.copies)}
        held = sum(sequence.blocks for sequence in known if sequence not in moving_out)
        assert self.free >= 0 and self.host_free >= 0 and self.draining >= 0
        assert self.draining == sum(sequence.host_blocks for sequence in moving_out)
        assert self.free + self.draining + held == self.device
        assert self.host_free + sum(sequence.host_blocks for sequence in known) == self.host
