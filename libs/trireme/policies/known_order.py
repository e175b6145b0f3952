"""Preemptive orders that know a length: yardsticks for the simulator, behind the live interface.

- srpt: shortest remaining processing time. An oracle: it is told what nobody knows.
- fixed: by the length of the input, for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from trireme.policies.batch_formation import BatchFormation, SwapRules
from trireme.policies.iteration import Budget, IterationDecision, Job, LevelChange, Run, Steady, ViewOf
from trireme.policies.iteration_profile import IterationProfile
from trireme.policies.kv_swap import BurstReserve
from trireme.policies.run_queue import Entry, RunQueue


class KnownOrderScheduler:
    """Smallest rank first, among equals by arrival. Meets `iteration.IterationScheduler`.

    Args:
        rank: asked at arrival and after each iteration that the job ran in.
        proactive: see `mlfq.MlfqSettings`.
    """

    profile_missing = 0

    def __init__(self, rank: Callable[[Job], float], *, proactive: bool = True) -> None:
        self._rank = rank
        self._proactive = proactive
        self._queue = RunQueue()
        self._num_added = 0
        self._spared: str | None = None
        self._burst = BurstReserve()

    def use_profile(self, profile: IterationProfile | None) -> None:
        """Nothing here depends on it."""

    def add(self, job: Job, *, now_s: float) -> str:
        """Let a job wait."""
        self._num_added += 1
        rank = self._rank(job)
        self._queue.add(Entry(job, (rank, self._num_added, job.sequence_id), now_s))
        return f"rank {rank:g}"

    def remove(self, sequence_id: str) -> None:
        """Forget a job."""
        self._queue.remove(sequence_id)

    def decide(self, budget: Budget, view: ViewOf, *, now_s: float) -> IterationDecision:
        """Form the batch and plan the moves."""
        rules = SwapRules(self._burst, lambda key: key[0], is_proactive=self._proactive)
        decision = BatchFormation(self._queue, budget, view, rules, self._spared).decide()
        if decision.evicted:
            self._spared = decision.evicted[-1].sequence_id
        return decision

    def charge(
        self, ran: Sequence[Run], seconds: float, *, now_s: float, iterations: int = 1
    ) -> tuple[LevelChange, ...]:
        """Ask for the new ranks of those that ran."""
        self._burst.pass_by(iterations - 1)
        for sequence_id, _ in ran:
            entry = self._queue.members.get(sequence_id)
            if entry is not None:
                entry.key = (self._rank(entry.job), *entry.key[1:])
                entry.last_s = now_s
        return ()

    def steady(self) -> Steady:
        """Who runs comes no later in the order than it was."""
        return Steady(math.inf, math.inf, self._queue.steady_blocks)

    def next_use_s(self, sequence_id: str, *, now_s: float) -> float:
        """0 while it runs, infinity if it is not here; else its rank, which orders as a time would."""
        entry = self._queue.entries.get(sequence_id)
        if entry is None:
            return math.inf
        return 0.0 if sequence_id in self._queue.members else entry.key[0]

    def order(self) -> Iterator[str]:
        """Everybody who waits, next first, lazily."""
        return self._queue.waiting()
