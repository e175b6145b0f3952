"""How long this engine's iterations take, learnt while they run, for a scheduler that must know it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from trireme.engine import batch
from trireme.policies.iteration import IterationScheduler
from trireme.policies.iteration_profile import Part
from trireme.policies.profile_estimator import ProfileEstimator

_REFRESH_STEPS = 512
"""The scheduler is told so often what was learnt; in the beginning, whenever the steps have doubled."""
_LEAST_STEPS = 16


class Pace:
    """Feeds an estimator with steps, and now and then a scheduler with the profile."""

    def __init__(self, scheduler: IterationScheduler) -> None:
        self._scheduler = scheduler
        self._estimator = ProfileEstimator(least=_LEAST_STEPS)
        self._parts: list[Part] = []
        self._num_steps = 0
        self._next_refresh = _LEAST_STEPS

    def begin(self, parts: Seq[batch.Part]) -> None:
        """A step is about to compute these."""
        self._parts = []
        batch_size = context = 0
        for sequence, count in parts:
            if count == 1 and sequence.num_computed:
                batch_size += 1
                context += sequence.num_computed
            else:
                self._parts.append(Part(1, count, sequence.num_computed))
        if batch_size:
            self._parts.append(Part(batch_size, 1, max(1, context // batch_size)))

    def observe(self, seconds: float) -> None:
        """It took so long."""
        self._estimator.observe(self._parts, seconds)
        self._num_steps += 1
        if self._num_steps < self._next_refresh:
            return
        self._next_refresh = self._num_steps + min(self._num_steps, _REFRESH_STEPS)
        profile = self._estimator.profile()
        if profile is not None:
            self._scheduler.use_profile(profile)
