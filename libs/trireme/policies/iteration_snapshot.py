"""Decide what one iteration of the engine runs: which sequences, how many tokens, who yields.

Pure: no clock, no I/O. The engine and the simulator call the same functions.

The rules, in order:

1. Decoding sequences run first, one token each, most urgent first. One that needs a block
   when none is free takes it from the least urgent running sequence, which is preempted and
   waits again; the most urgent running sequence is therefore never preempted for a block.
2. Sequences that are being prefilled take what is left of the token budget, most urgent first.
3. Waiting sequences are admitted, most urgent first, while slots, budget and blocks last. An
   admission takes blocks for all tokens known so far and leaves `watermark_blocks` free, unless
   nothing runs. None is admitted in an iteration that preempted somebody for a block.
4. A waiting sequence that does not fit lets smaller ones behind it pass, but only in
   `max_passes` iterations: then nothing behind it is admitted until it is. What runs ends,
   so it gets its turn; nobody is starved by sequences that come after it in the order.
5. A sequence whose next block another one is computing waits for it, and then shares it.

First come, first served orders by arrival. Priority orders by priority (larger first), then
by arrival, and a waiting sequence may take the slot and blocks of running ones of strictly
lower priority. A constant stream of urgent work does starve the rest: that is what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class WaitingSequence(NamedTuple):
    """A sequence that holds no blocks. A tuple: these are made every iteration."""

    sequence_id: str
    arrival_s: float
    priority: int
    num_tokens: int
    """Tokens to compute until it can be sampled, after reuse of resident blocks."""
    num_blocks: int
    """Available blocks that admission takes: all its blocks but those that others hold."""
    times_passed: int = 0
    """Iterations in which a later one was admitted because this one did not fit."""
    next_block: bytes | None = None
    """Hash of the first block it would compute; None if it would fill none."""
    is_block_pending: bool = False
    """A running sequence is computing `next_block` now."""


class RunningSequence(NamedTuple):
    """A sequence that holds blocks."""

    sequence_id: str
    arrival_s: float
    priority: int
    num_tokens: int
    """Tokens to compute until it can be sampled: 1 while decoding."""
    num_blocks: int
    """Blocks that running them takes beyond those it holds."""
    held_blocks: int
    """Blocks that become available if it is preempted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationState:
    """What the engine knows before an iteration."""

    waiting: Sequence[WaitingSequence]
    running: Sequence[RunningSequence]
    token_budget: int
    """Tokens the iteration may compute; at least `max_sequences`."""
    max_sequences: int
    free_blocks: int
    watermark_blocks: int = 0
    """Blocks that admission leaves free, so that decoding does not preempt at once."""
    max_passes: int = 64


class Run(NamedTuple):
    """A sequence that runs in this iteration."""

    sequence_id: str
    num_tokens: int


class Preemption(NamedTuple):
    """A running sequence that gives up its blocks and waits again."""

    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationDecision:
    """What to do, and why."""

    runs: tuple[Run, ...]
    admitted: frozenset[str]
    """Those of `runs` that waited."""
    preempted: tuple[Preemption, ...]
    passed: tuple[str, ...]
    """Waiting sequences that were overtaken: their `times_passed` grows by one."""
    reason: str
    """One line for the trace."""


IterationPolicy = Callable[[IterationState], IterationDecision]
"""The type behind which other orders live."""


class Candidate(Protocol):
    """What an order looks at."""

    @property
    def sequence_id(self) -> str: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def priority(self) -> int: ...


IterationOrder = Callable[[Candidate], tuple[float, float, str]]
"""Most urgent first."""


def fcfs_order(sequence: Candidate) -> tuple[float, float, str]:
    """By arrival."""
    return 0.0, sequence.arrival_s, sequence.sequence_id


def priority_order(sequence: Candidate) -> tuple[float, float, str]:
    """By priority, larger first, then by arrival."""
    return -sequence.priority, sequence.arrival_s, sequence.sequence_id


def schedule_fcfs(state: IterationState) -> IterationDecision:
    """First come, first served."""
    return _Iteration(state, fcfs_order, takes_over=False).decide()


def schedule_priority(state: IterationState) -> IterationDecision:
    """Larger priority first, then first come; the urgent take over from the less urgent."""
    return _Iteration(state, priority_order, takes_over=True).decide()


class _Iteration:
    """The budgets of one decision while it is made."""

    def __init__(self, state: IterationState, order: IterationOrder, *, takes_over: bool) -> None:
        self.state = state
        self.order = order
        self.takes_over = takes_over
        self.running = sorted(state.running, key=order)
        self.tokens = state.token_budget
        self.blocks = state.free_blocks
        self.runs: dict[str, int] = {}
        self.admitted: list[str] = []
        self.preempted: list[Preemption] = []
        self.passed: list[str] = []

    def decide(self) -> IterationDecision:
        """Apply the rules in order."""
        self._decode()
        is_short = bool(self.preempted)
        self._prefill()
        if not is_short:
            self._admit()
        return IterationDecision(
            runs=tuple([Run(sequence_id, count) for sequence_id, count in self.runs.items()]),
            admitted=frozenset(self.admitted),
            preempted=tuple(self.preempted),
            passed=tuple(self.passed),
            reason=(
                f"{len(self.runs)} run {self.state.token_budget - self.tokens} tokens, "
                f"{len(self.admitted)} admitted, {len(self.preempted)} preempted, {self.blocks} blocks free"
            ),
        )

    def _decode(self) -> None:
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.num_tokens != 1 or self.tokens == 0:
                continue
            while self.blocks < sequence.num_blocks:
                victim = self.running[-1]
                reason = f"{sequence.sequence_id} needs {sequence.num_blocks} blocks, {self.blocks} are free"
                self._preempt(victim, reason)
                if victim is sequence:
                    return
            self._run(sequence.sequence_id, 1, sequence.num_blocks)

    def _prefill(self) -> None:
        for sequence in self.running:
            if self.tokens == 0:
                return
            if sequence.num_tokens > 1 and sequence.num_blocks <= self.blocks:
                count = min(sequence.num_tokens, self.tokens)
                self._run(sequence.sequence_id, count, sequence.num_blocks)

    def _admit(self) -> None:
        waiting = sorted(self.state.waiting, key=self.order)
        claimed: set[bytes] = set()
        not_fitting: list[str] = []
        for sequence in waiting:
            if self.tokens == 0:
                break
            if sequence.is_block_pending or sequence.next_block in claimed:
                continue
            if not self._fits(sequence) and not self._take_over(sequence):
                if len(self.running) + len(self.admitted) >= self.state.max_sequences:
                    break
                not_fitting.append(sequence.sequence_id)
                if sequence.times_passed >= self.state.max_passes:
                    break
                continue
            self._run(sequence.sequence_id, min(sequence.num_tokens, self.tokens), sequence.num_blocks)
            self.admitted.append(sequence.sequence_id)
            if sequence.next_block is not None:
                claimed.add(sequence.next_block)
            self.passed = not_fitting.copy()

    def _fits(self, sequence: WaitingSequence) -> bool:
        num_running = len(self.running) + len(self.admitted)
        reserve = self.state.watermark_blocks if num_running else 0
        return num_running < self.state.max_sequences and sequence.num_blocks + reserve <= self.blocks

    def _take_over(self, sequence: WaitingSequence) -> bool:
        """Preempt as few running sequences of lower priority as make `sequence` fit."""
        if not self.takes_over:
            return False
        victims: list[RunningSequence] = []
        blocks = self.blocks
        num_running = len(self.running) + len(self.admitted)
        for victim in reversed(self.running):
            if victim.priority >= sequence.priority:
                break
            victims.append(victim)
            blocks += victim.held_blocks
            if victim.sequence_id in self.runs:
                blocks += victim.num_blocks
            num_left = num_running - len(victims)
            reserve = self.state.watermark_blocks if num_left else 0
            if num_left < self.state.max_sequences and sequence.num_blocks + reserve <= blocks:
                for taken in victims:
                    self._preempt(taken, f"{sequence.sequence_id} has priority {sequence.priority}")
                return True
        return False

    def _preempt(self, victim: RunningSequence, reason: str) -> None:
        assert self.running[-1] is victim
        self.running.pop()
        self.preempted.append(Preemption(victim.sequence_id, reason))
        self.blocks += victim.held_blocks
        count = self.runs.pop(victim.sequence_id, 0)
        if count:
            self.tokens += count
            self.blocks += victim.num_blocks

    def _run(self, sequence_id: str, num_tokens: int, num_blocks: int) -> None:
        self.runs[sequence_id] = num_tokens
        self.tokens -= num_tokens
        self.blocks -= num_blocks
