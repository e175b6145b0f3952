"""First come, first served, and by priority: who runs goes on running unless somebody needs its blocks.

The rules, in order:

1. Decoding sequences run first, one token each, most urgent first. One that needs a block when none is free
   takes it from the least urgent running sequence, which waits again; the most urgent running sequence
   is therefore never preempted for a block. While the block is being copied out its taker pauses.
2. Sequences that are being prefilled take what is left of the token budget, most urgent first.
3. Waiting sequences are admitted, most urgent first, while slots, budget and blocks last. An admission takes
   blocks for all tokens known so far and leaves `watermark_blocks` free, unless nothing runs. None is
   admitted in an iteration that preempted somebody for a block. One whose KV is on the host is copied in.
4. A waiting sequence that does not fit lets smaller ones behind it pass, but only in `max_passes` iterations:
   then nothing behind it is admitted until it is. What runs ends, so it gets its turn; nobody is starved by
   sequences that come after it in the order.
5. A sequence whose next block another one is computing waits for it, and then shares it.

First come, first served orders by arrival. Priority orders by priority (larger first), then by arrival, and a
waiting sequence may take the slot and blocks of running ones of strictly lower priority. A constant stream of
urgent work does starve the rest: that is what it asks for.

Victims are copied to the host, and come back in their place of the order; where the host has no room for
one, it gives up its KV and computes it again.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from trireme.policies.iteration import (
    Budget,
    IterationDecision,
    Job,
    LevelChange,
    Location,
    Preemption,
    Run,
    SequenceView,
    Steady,
    ViewOf,
)
from trireme.policies.iteration_profile import IterationProfile
from trireme.policies.sorted_keys import SortedKeys

CANDIDATES = 32
"""Waiting sequences that are looked at in one iteration."""
_FORGETTING = 0.9
"""Weight of the past in the mean time between two admissions."""

Key = tuple[int, float, str]
"""(minus priority or 0, arrival, sequence id), most urgent first."""


class ArrivalOrderScheduler:
    """Meets `iteration.IterationScheduler`.

    Args:
        by_priority: the priority policy; else first come, first served.
    """

    profile_missing = 0

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._keys: dict[str, Key] = {}
        self._running: dict[str, Key] = {}
        """Those that hold a slot: on the device, or on their way to it."""
        self._waiting: SortedKeys[Key] = SortedKeys()
        self._passes: dict[str, int] = {}
        """Of those that wait and were overtaken, in how many iterations."""
        self._last_batch: frozenset[str] = frozenset()
        self._steady_blocks = -1
        self._admitted_s: float | None = None
        self._between_s = 0.0

    def use_profile(self, profile: IterationProfile | None) -> None:
        """Nothing here depends on it."""

    def add(self, job: Job, *, now_s: float) -> str:
        """Let a job wait."""
        assert job.sequence_id not in self._keys, f"{job.sequence_id} is here already"
        key = (-job.priority if self._by_priority else 0, job.arrival_s, job.sequence_id)
        self._keys[job.sequence_id] = key
        self._waiting.add(key)
        if self._by_priority:
            return f"priority {job.priority}, {len(self._waiting)} wait"
        return f"{len(self._waiting)} wait"

    def remove(self, sequence_id: str) -> None:
        """Forget a job."""
        key = self._keys.pop(sequence_id, None)
        if key is not None and self._running.pop(sequence_id, None) is None:
            self._waiting.discard(key)
            self._passes.pop(sequence_id, None)

    def decide(self, budget: Budget, view: ViewOf, *, now_s: float) -> IterationDecision:
        """Apply the rules in order."""
        seen = {sequence_id: view(sequence_id) for sequence_id in self._running}
        for sequence_id, found in seen.items():
            if found.location in (Location.NONE, Location.HOST):
                self._waiting.add(self._running.pop(sequence_id))
        iteration = _Iteration(
            budget, view, sorted(self._running.values()), seen, self._passes, takes_over=self._by_priority
        )
        decision = iteration.decide(iter(self._waiting), self._last_batch)
        for sequence_id, _ in (*decision.swap_out, *decision.evicted):
            self._waiting.add(self._running.pop(sequence_id))
        for sequence_id in (*decision.admitted, *decision.swap_in):
            key = self._keys[sequence_id]
            self._waiting.discard(key)
            self._running[sequence_id] = key
            self._passes.pop(sequence_id, None)
        for sequence_id in decision.passed:
            self._passes[sequence_id] = self._passes.get(sequence_id, 0) + 1
        self._last_batch = frozenset([sequence_id for sequence_id, _ in decision.runs])
        self._steady_blocks = iteration.steady_blocks()
        self._note_admissions(len(decision.admitted), now_s)
        return decision

    def charge(
        self, ran: Sequence[Run], seconds: float, *, now_s: float, iterations: int = 1
    ) -> tuple[LevelChange, ...]:
        """Time changes nothing here."""
        return ()

    def steady(self) -> Steady:
        """Until somebody needs a block and there is none."""
        return Steady(math.inf, math.inf, self._steady_blocks)

    def next_use_s(self, sequence_id: str, *, now_s: float) -> float:
        """Those that wait ahead of it times the mean time between two admissions."""
        key = self._keys.get(sequence_id)
        if key is None:
            return math.inf
        return 0.0 if sequence_id in self._running else bisect_left(self._waiting, key) * self._between_s

    def order(self) -> Iterator[str]:
        """Everybody who waits, next first, lazily."""
        return (key[2] for key in self._waiting)

    def _note_admissions(self, count: int, now_s: float) -> None:
        if not count:
            return
        if self._admitted_s is not None:
            keep = _FORGETTING**count if self._between_s else 0.0
            between_s = max(0.0, now_s - self._admitted_s) / count
            self._between_s = keep * self._between_s + (1.0 - keep) * between_s
        self._admitted_s = now_s


class _Iteration:
    """The budgets of one decision while it is made.

    Args:
        running: their keys, most urgent first, without those whose KV was lost.
        seen: how they are; those of other sequences are added.
        passes: iterations in which those that wait were overtaken.
    """

    def __init__(
        self,
        budget: Budget,
        view: ViewOf,
        running: list[Key],
        seen: dict[str, SequenceView],
        passes: dict[str, int],
        *,
        takes_over: bool,
    ) -> None:
        self.budget = budget
        self.view = view
        self.running = running
        self.seen = seen
        self.passes = passes
        self.takes_over = takes_over
        self.tokens = budget.token_budget
        self.now = budget.free_blocks
        self.soon = budget.draining_blocks
        """Blocks that copies still read, not promised to anybody yet."""
        self.host = budget.host_free_blocks
        self.runs: dict[str, int] = {}
        self.admitted: list[str] = []
        self.swap_in: list[str] = []
        self.swap_out: dict[str, str] = {}
        self.evicted: dict[str, str] = {}
        self.paused: dict[str, str] = {}
        self.passed: list[str] = []
        self.is_pending = False
        """Somebody waits for a block that another one computes."""
        self.claims: list[str] = []
        """Those whose blocks are still being copied out."""

    def decide(self, waiting: Iterator[Key], last_batch: frozenset[str]) -> IterationDecision:
        self._decode()
        is_short = bool(self.swap_out or self.evicted or self.claims)
        self._prefill()
        if not is_short:
            self._admit(waiting)
        waits_for_copies = not self.runs and bool(self.claims)
        if waits_for_copies:
            self._run_first_claim()
        gone = self.swap_out.keys() | self.evicted.keys()
        paused = [
            Preemption(key[2], self.paused.get(key[2], "others take all tokens"))
            for key in self.running
            if key[2] not in self.runs and key[2] in last_batch and key[2] not in gone
        ]
        return IterationDecision(
            runs=tuple([Run(sequence_id, count) for sequence_id, count in self.runs.items()]),
            admitted=frozenset(self.admitted),
            paused=tuple(paused),
            swap_out=tuple([Preemption(*pair) for pair in self.swap_out.items()]),
            swap_in=tuple(self.swap_in),
            evicted=tuple([Preemption(*pair) for pair in self.evicted.items()]),
            passed=tuple(self.passed),
            waits_for_copies=waits_for_copies,
            reason=(
                f"{len(self.runs)} run {self.budget.token_budget - self.tokens} tokens, "
                f"{len(self.admitted)} admitted, {len(paused)} paused, {len(self.swap_out)} out, "
                f"{len(self.swap_in)} in, {len(self.evicted)} evicted, "
                f"{self.now} blocks free, {self.soon} soon"
            ),
        )

    def steady_blocks(self) -> int:
        """Blocks left until somebody must leave; negative where something is under way."""
        is_moving = any(found.location is Location.MOVING for found in self.seen.values())
        is_waiting = is_moving or self.claims or self.is_pending
        return -1 if is_waiting or self.swap_out or self.swap_in or self.evicted else self.now

    def _decode(self) -> None:
        index = 0
        while index < len(self.running):
            sequence_id = self.running[index][2]
            found = self.seen[sequence_id]
            index += 1
            if found.location is Location.MOVING or found.num_tokens != 1 or self.tokens == 0:
                continue
            while self.now + self.soon < found.num_blocks:
                victim = self._last_movable(index - 1)
                reason = f"{sequence_id} needs {found.num_blocks} blocks, {self.now} are free"
                self._preempt(victim, reason)
                if victim[2] == sequence_id:
                    return
            if found.num_blocks <= self.now:
                self._run(sequence_id, 1, found.num_blocks)
            else:
                self._claim(sequence_id, found.num_blocks)

    def _prefill(self) -> None:
        for key in self.running:
            if self.tokens == 0:
                return
            found = self.seen[key[2]]
            if found.location is Location.DEVICE and found.num_tokens > 1 and found.num_blocks <= self.now:
                self._run(key[2], min(found.num_tokens, self.tokens), found.num_blocks)

    def _admit(self, waiting: Iterator[Key]) -> None:
        claimed: set[bytes] = set()
        not_fitting: list[str] = []
        for key, _ in zip(waiting, range(CANDIDATES), strict=False):
            if self.tokens == 0:
                break
            sequence_id = key[2]
            found = self.seen[sequence_id] = self.view(sequence_id)
            if found.is_block_pending or found.next_block in claimed:
                self.is_pending = True
                continue
            if found.location is Location.MOVING or not (self._fits(found) or self._take_over(key, found)):
                if self._num_slots() >= self.budget.max_sequences or self.claims:
                    break
                not_fitting.append(sequence_id)
                if self.passes.get(sequence_id, 0) >= self.budget.max_passes:
                    break
                continue
            if found.location is Location.HOST:
                self.swap_in.append(sequence_id)
                self.now -= found.num_blocks
            else:
                self.admitted.append(sequence_id)
                self._run(sequence_id, min(found.num_tokens, self.tokens), found.num_blocks)
                if found.next_block is not None:
                    claimed.add(found.next_block)
            self.passed = not_fitting.copy()

    def _num_slots(self) -> int:
        return len(self.running) + len(self.admitted) + len(self.swap_in)

    def _fits(self, found: SequenceView) -> bool:
        num_slots = self._num_slots()
        reserve = self.budget.watermark_blocks if num_slots else 0
        return num_slots < self.budget.max_sequences and found.num_blocks + reserve <= self.now

    def _take_over(self, key: Key, found: SequenceView) -> bool:
        """Preempt as few running sequences of lower priority as make it fit; False: not, or not yet."""
        if not self.takes_over:
            return False
        victims: list[Key] = []
        now, host = self.now, self.host
        blocks = now + self.soon
        num_slots = self._num_slots()
        for victim in (None, *reversed(self.running)):
            if victim is not None:
                if victim[0] <= key[0]:
                    break
                if self.seen[victim[2]].location is Location.MOVING:
                    continue
                victims.append(victim)
                held = self.seen[victim[2]].held_blocks
                is_kept = held <= host
                host -= held if is_kept else 0
                taken_back = self.seen[victim[2]].num_blocks if victim[2] in self.runs else 0
                blocks += held + taken_back
                now += taken_back + (0 if is_kept else held)
            num_left = num_slots - len(victims)
            reserve = self.budget.watermark_blocks if num_left else 0
            if num_left < self.budget.max_sequences and found.num_blocks + reserve <= blocks:
                for taken in victims:
                    self._preempt(taken, f"{key[2]} has priority {-key[0]}")
                if found.num_blocks + reserve <= now:
                    return True
                self._claim(key[2], found.num_blocks)
                return False
        return False

    def _last_movable(self, index: int) -> Key:
        """The least urgent running sequence that no copy holds; at the least the one at `index`."""
        return next(
            key
            for place, key in zip(range(len(self.running) - 1, -1, -1), reversed(self.running), strict=True)
            if place <= index or self.seen[key[2]].location is not Location.MOVING
        )

    def _preempt(self, victim: Key, reason: str) -> None:
        self.running.remove(victim)
        sequence_id = victim[2]
        found = self.seen[sequence_id]
        count = self.runs.pop(sequence_id, 0)
        if count:
            self.tokens += count
            self.now += found.num_blocks
        if found.held_blocks <= self.host:
            self.swap_out[sequence_id] = reason
            self.host -= found.held_blocks
            self.soon += found.held_blocks
        else:
            self.evicted[sequence_id] = (
                f"{reason}; the host has room for {self.host} of its {found.held_blocks}"
            )
            self.now += found.held_blocks

    def _claim(self, sequence_id: str, num_blocks: int) -> None:
        self.soon -= num_blocks - self.now
        self.now = 0
        self.claims.append(sequence_id)
        self.paused[sequence_id] = f"the {num_blocks} blocks it needs are still being copied out"

    def _run_first_claim(self) -> None:
        """Nothing else can run: one waits for the copies."""
        sequence_id = self.claims[0]
        found = self.seen[sequence_id]
        if found.location is Location.HOST:
            self.swap_in.append(sequence_id)
            return
        if found.location is Location.NONE:
            self.admitted.append(sequence_id)
        self._run(sequence_id, min(found.num_tokens, self.tokens), 0)

    def _run(self, sequence_id: str, num_tokens: int, num_blocks: int) -> None:
        self.runs[sequence_id] = num_tokens
        self.tokens -= num_tokens
        self.now -= num_blocks
