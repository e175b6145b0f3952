"""Skip-join multi-level feedback queue: short jobs first without knowing how long a job is.

Levels 1..n have quanta q_1, 2 q_1, 4 q_1, ...; the last is infinite. A job joins the level whose quantum
covers its first iteration, which the prompt's uncached length tells. The batch is taken from the highest
level down, first in, first out inside a level. Every member is charged each iteration's wall time; one that
has used more than its quantum goes to the tail of a lower level, any other keeps its place, which is the
front: ahead of it stand only those that could not run.

Prompts: the level that a job joins has its prefill for a price, so a prompt's chunks are not charged, however
many they are and whoever shares them; the quantum is for the answer. (Charged, a prefill leaves nothing of
the quantum, and short answers to long prompts go down with their first token.) That holds for the level it
joined and below. A job that was promoted above it is charged in full: its prompt may hold level 1 for one
chunk, not for all. A member that decodes beside chunks is charged what decoding alone would have taken:
where prompts are long it would else go down for the prompts of others, and short answers with it.

Starvation: every `promote_period` iterations at most `promote_max` jobs, those that ran longest ago and wait
for more than alpha, go to the front of level 1 with a new quantum, if their KV can come back in time.
(Promoting whoever waits longer than alpha, at every iteration, makes level 1 a round-robin and the link the
bottleneck as soon as the load is high.)

With `learns_quanta` these quanta hold until enough jobs have ended; then the levels end where `quanta` says
that they serve the recent demand best, which may be nowhere: first come, first served.

Source: FastServe, arXiv 2305.05920 and NSDI 2026, sections 4.1-4.3. Our own choices where the sources differ:
what prompts and those beside them are charged, demotion by one level, alpha of seconds, the limit on
promotions, `used` reset by a promotion, and an ENST that orders as the levels do but for the next few
promotions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trireme.errors import InvalidConfiguration
from trireme.policies.batch_formation import BatchFormation, SwapRules
from trireme.policies.demand_record import DemandRecord
from trireme.policies.iteration import (
    Budget,
    IterationDecision,
    Job,
    LevelChange,
    Location,
    Run,
    Steady,
    ViewOf,
)
from trireme.policies.iteration_profile import IterationProfile, Part
from trireme.policies.kv_swap import BurstReserve, LevelLoad
from trireme.policies.quanta import Thresholds
from trireme.policies.run_queue import Entry, Key, RunQueue
from trireme.policies.starvation import StarvationLine

_NO_QUANTUM_S = 1e-9
"""Of a level that is not used."""
_FORGETTING = 0.9
"""Weight of the past in the mean iteration time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlfqSettings:
    """Knobs of the queue. Raises InvalidConfiguration: a value is out of range."""

    levels: int = 16
    unmeasured_quantum_s: float = 0.010
    """q_1 while there is no profile."""
    quantum_s: float | None = None
    """q_1; None: the profile's 10th percentile of decode iterations at batch 1."""
    learns_quanta: bool = False
    """Choose the levels by the demand that jobs show, where `quantum_s` is None."""
    skip_join: bool = True
    """False: everybody joins level 1 and pays for its prefill there (naive MLFQ)."""
    eta: int = 1
    """Levels that a demotion goes down."""
    slo_per_token_s: float = 0.0
    """Sets alpha where that is None."""
    alpha_s: float | None = None
    """Waiting for longer is starving; None: max(3 s, 10 * SLO per token); infinity: nobody is promoted."""
    promote_period: int = 20
    """Iterations between two promotion scans."""
    promote_max: int = 1
    """Promotions per scan."""
    enst_v2: bool = False
    """T_execute less what higher jobs have burnt already, plus the quanta of those ahead in its level."""
    spike: float = 4.0
    """An iteration is charged as at most this many times its profiled time: a stall demotes nobody."""
    proactive: bool = True
    """Keep blocks idle for bursts and bring KV back ahead of need; False: move only what a batch needs."""

    def __post_init__(self) -> None:
        for name in ("levels", "eta", "promote_period"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("unmeasured_quantum_s", "spike"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InvalidConfiguration(f"{name} is {getattr(self, name)}; it must be positive")
        if self.quantum_s is not None and not 0.0 < self.quantum_s < math.inf:
            raise InvalidConfiguration(f"quantum_s is {self.quantum_s}; it must be positive")
        if self.promote_max < 0 or not self.slo_per_token_s >= 0.0:
            raise InvalidConfiguration("promote_max and slo_per_token_s must not be negative")
        if self.alpha_s is not None and not self.alpha_s >= 0.0:
            raise InvalidConfiguration(f"alpha_s is {self.alpha_s}; it must not be negative")

    @property
    def starving_s(self) -> float:
        """alpha."""
        return max(3.0, 10.0 * self.slo_per_token_s) if self.alpha_s is None else self.alpha_s


class MlfqScheduler:
    """The queue and its levels. Meets `iteration.IterationScheduler`."""

    def __init__(self, profile: IterationProfile | None, settings: MlfqSettings | None = None) -> None:
        self.settings = settings or MlfqSettings()
        self.profile_missing = 0
        self._queue = RunQueue()
        self._load = LevelLoad((0.0,) * self.settings.levels)
        self._num_left = [0] * (self.settings.levels + 1)
        """By level: jobs that have left it, so that seats tell how many stand ahead."""
        self._num_seated = [0] * (self.settings.levels + 1)
        self._tail = 0
        self._front = 0
        self._line = StarvationLine(
            self._queue, starving_s=self.settings.starving_s, most=self.settings.promote_max
        )
        self._iterations_to_scan = self.settings.promote_period
        self._iteration_s = 0.0
        self._batch = 1
        self._spared: str | None = None
        self._now_s = 0.0
        self._burst = BurstReserve()
        learns = self.settings.learns_quanta and self.settings.quantum_s is None
        self._demand = DemandRecord() if learns else None
        self._under_way: dict[str, Entry] = {}
        """Jobs that have run, where the demand is recorded."""
        self._thresholds: Thresholds | None = None
        self.use_profile(profile)

    def use_profile(self, profile: IterationProfile | None) -> None:
        """Take new times and quanta. Jobs keep their levels."""
        self._profile = profile
        settings = self.settings
        first_s = settings.quantum_s or (profile.quantum_s if profile is not None else None)
        first_s = first_s or settings.unmeasured_quantum_s
        if self._thresholds is None:
            self._use_quanta(tuple(first_s * 2.0**index for index in range(settings.levels)))

    def _use_quanta(self, finite_s: tuple[float, ...]) -> None:
        self.quanta_s = (0.0, *finite_s[:-1], math.inf)
        """By level; there is no level 0. The last has no end, whatever ENST takes for its length."""
        self._load.use_quanta(finite_s)

    def _learn(self, now_s: float) -> None:
        """Levels for the demand as it is. Jobs of a level that is no more leave it when they have run."""
        assert self._demand is not None
        self._thresholds = self._demand.choose(self._under_way.values(), now_s=now_s)
        ends_s = self._thresholds.ends_s[: self.settings.levels - 1]
        quanta_s = tuple(end_s - start_s for start_s, end_s in zip((0.0, *ends_s), ends_s, strict=False))
        unused = (_NO_QUANTUM_S,) * (self.settings.levels - 1 - len(quanta_s))
        self._use_quanta((*quanta_s, *unused, max(quanta_s, default=_NO_QUANTUM_S)))

    def add(self, job: Job, *, now_s: float) -> str:
        """Let a job join its level; says which and why."""
        level, reason = self._join_level(job)
        self._tail += 1
        entry = Entry(job, (level, self._tail, job.sequence_id), min(job.arrival_s, now_s))
        entry.join_level = level
        self._queue.add(entry)
        self._enter(entry)
        self._line.add(entry)
        self._now_s = now_s
        if self._demand is not None:
            self._demand.arrive(now_s)
        return f"level {level}: {reason}"

    def remove(self, sequence_id: str) -> None:
        """Forget a job."""
        entry = self._queue.remove(sequence_id)
        if entry is None:
            return
        self._leave(entry)
        self._under_way.pop(sequence_id, None)
        if self._demand is not None and self._demand.end(entry):
            self._learn(self._now_s)

    def decide(self, budget: Budget, view: ViewOf, *, now_s: float) -> IterationDecision:
        """Promote, then form the batch and plan the moves."""
        promoted: tuple[LevelChange, ...] = ()
        if self._iterations_to_scan <= 0:
            overdue = -self._iterations_to_scan % self.settings.promote_period
            self._iterations_to_scan = self.settings.promote_period - overdue
            if not overdue:
                promoted = self._promote(budget, view, now_s)
        self._batch = budget.max_sequences
        queue = self._queue
        rules = SwapRules(
            burst=self._burst,
            execute_s=self._execute_of_key_s,
            soon_promoted=lambda: self._soon_promoted(now_s),
            jobs_above=lambda key: self._load.jobs_above(int(key[0])),
            is_proactive=self.settings.proactive,
            link_blocks=2.0 * budget.link_blocks_per_s * self._iteration_s
            if budget.link_blocks_per_s < math.inf
            else math.inf,
        )
        before = queue.members
        decision = BatchFormation(queue, budget, view, rules, self._spared).decide()
        for sequence_id in before.keys() - queue.members.keys():
            self._line.add(before[sequence_id])
        if decision.evicted:
            self._spared = decision.evicted[-1].sequence_id
        return _with_promotions(decision, promoted)

    def charge(
        self, ran: Sequence[Run], seconds: float, *, now_s: float, iterations: int = 1
    ) -> tuple[LevelChange, ...]:
        """Bill the iteration to all members; says who is demoted.

        Args:
            seconds: of `iterations` equal iterations together.
        """
        self._now_s = now_s
        self._iterations_to_scan -= iterations
        self._burst.pass_by(iterations - 1)
        members = self._queue.members
        billed = [(members[sequence_id], count) for sequence_id, count in ran if sequence_id in members]
        seconds = self._capped_s(billed, seconds, iterations)
        keep = _FORGETTING**iterations if self._iteration_s else 0.0
        self._iteration_s = keep * self._iteration_s + (1.0 - keep) * seconds / iterations
        changes: list[LevelChange] = []
        quanta_s = self.quanta_s
        prefilling = self._queue.prefilling
        is_refined = self.settings.enst_v2
        demand = self._demand
        decode_s = self._beside_chunks_s(billed, seconds) if prefilling else seconds
        for entry, count in billed:
            entry.last_s = now_s
            entry.computed_tokens += count
            level = int(entry.key[0])
            charged_s = decode_s
            if prefilling and entry.key[2] in prefilling:
                charged_s = 0.0 if self._is_protected(entry) else seconds
            entry.used_s += charged_s
            if demand is not None:
                demand.charge(entry, seconds, len(billed))
                self._under_way[entry.key[2]] = entry
            if is_refined:
                self._load.charge(level, charged_s)
            if entry.used_s > quanta_s[level]:
                changes.append(self._demote(entry, level, len(billed)))
        return tuple(changes)

    def steady(self) -> Steady:
        """Until somebody's quantum is spent, or a scan that may find somebody."""
        quanta_s = self.quanta_s
        left_s = min(
            (quanta_s[entry.level] - entry.used_s for entry in self._queue.members.values()), default=0.0
        )
        iterations = self._iterations_to_scan if len(self._line) else math.inf
        return Steady(left_s, iterations, self._queue.steady_blocks)

    def next_use_s(self, sequence_id: str, *, now_s: float) -> float:
        """ENST: 0 while it runs, infinity if it is not here."""
        entry = self._queue.entries.get(sequence_id)
        if entry is None:
            return math.inf
        if sequence_id in self._queue.members:
            return 0.0
        execute_s = self._execute_s(entry)
        for other, promote_s in self._line.expected_s(self._scan_s(), self._period_s(), now_s=now_s):
            if other is entry:
                return min(execute_s, promote_s)
        return execute_s

    def order(self) -> Iterator[str]:
        """Everybody who waits, next first, lazily."""
        return self._queue.waiting()

    def level_of(self, sequence_id: str) -> int:
        """Where a job stands.

        Raises:
            KeyError: it is not here.
        """
        return self._queue.entries[sequence_id].level

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Jobs at levels 1, 2, ..., running or waiting."""
        return tuple(self._load.counts[1:])

    def _join_level(self, job: Job) -> tuple[int, str]:
        profile = self._profile
        first_s = (
            profile.first_iteration_s(job.new_tokens, job.cached_tokens) if profile is not None else None
        )
        if first_s is not None:
            first_s += job.load_stall_s
        if first_s is None or not 0.0 < first_s < math.inf:
            self.profile_missing += 1
            return 1, f"no profile tells the time of {job.new_tokens} tokens"
        if not self.settings.skip_join:
            return 1, f"everybody joins here; its first iteration takes {_ms(first_s)}"
        quanta_s = self.quanta_s
        level = next(level for level in range(1, len(quanta_s)) if quanta_s[level] >= first_s)
        reason = f"its first iteration takes {_ms(first_s)}, the quantum is {_ms(quanta_s[level])}"
        if job.urgency:
            level = min(max(1, level - job.urgency), len(quanta_s) - 1)
            reason += f", its urgency {job.urgency:+d}"
        return level, reason

    def _is_protected(self, entry: Entry) -> bool:
        """Its prefill does not demote it."""
        return self.settings.skip_join and entry.level >= entry.join_level

    def _demote(self, entry: Entry, level: int, batch: int) -> LevelChange:
        quanta_s = self.quanta_s
        last = len(quanta_s) - 1
        target = min(level + self.settings.eta, last)
        while target < last and quanta_s[target] <= _NO_QUANTUM_S:
            target += 1
        decode_s = (
            self._profile.decode_s(batch) if self._profile is not None and self.settings.skip_join else None
        )
        while target < last and decode_s is not None and quanta_s[target] < decode_s:
            target += 1
        reason = f"it used {_ms(entry.used_s)} of the {_ms(quanta_s[level])} of level {level}"
        self._leave(entry)
        self._tail += 1
        entry.key = (target, self._tail, entry.job.sequence_id)
        entry.used_s = 0.0
        self._enter(entry)
        return LevelChange(entry.job.sequence_id, level, target, reason)

    def _enter(self, entry: Entry) -> None:
        level = entry.level
        self._load.enter(level)
        entry.seat = self._num_seated[level]
        self._num_seated[level] += 1

    def _leave(self, entry: Entry) -> None:
        self._load.leave(entry.level, entry.used_s if self.settings.enst_v2 else 0.0)
        self._num_left[entry.level] += 1

    def _beside_chunks_s(self, billed: Sequence[tuple[Entry, int]], seconds: float) -> float:
        """What an iteration that has chunks in it costs its members that decode."""
        if self._profile is None or not self.settings.skip_join:
            return seconds
        prefilling = self._queue.prefilling
        contexts = [entry.computed_tokens for entry, _ in billed if entry.key[2] not in prefilling]
        if not contexts or len(contexts) == len(billed):
            return seconds
        decode_s = self._profile.decode_s(len(contexts), max(1, sum(contexts) // len(contexts)))
        return seconds if decode_s is None else min(seconds, decode_s)

    def _capped_s(self, billed: Sequence[tuple[Entry, int]], seconds: float, iterations: int) -> float:
        if self._profile is None or not billed:
            return seconds
        if seconds <= self.settings.spike * (self._profile.quantum_s or 0.0) * iterations:
            return seconds
        batch = context = 0
        parts: list[Part] = []
        prefilling = self._queue.prefilling
        for entry, count in billed:
            if entry.key[2] in prefilling:
                parts.append(Part(1, count, entry.computed_tokens))
            else:
                batch += 1
                context += entry.computed_tokens
        if batch:
            parts.append(Part(batch, 1, max(1, context // batch)))
        expected_s = self._profile.iteration_s(parts)
        return seconds if expected_s is None else min(seconds, self.settings.spike * expected_s * iterations)

    def _promote(self, budget: Budget, view: ViewOf, now_s: float) -> tuple[LevelChange, ...]:
        link_blocks = budget.link_blocks_per_s * self._iteration_s * self.settings.promote_period
        room = min(budget.free_blocks + budget.draining_blocks, link_blocks)

        def fits(entry: Entry) -> bool:
            seen = view(entry.job.sequence_id)
            if seen.location is Location.HOST:
                return seen.num_blocks <= room
            return seen.location is not Location.MOVING

        return tuple([self._lift(entry, now_s) for entry in self._line.scan(fits, now_s=now_s)])

    def _lift(self, entry: Entry, now_s: float) -> LevelChange:
        level = entry.level
        self._queue.leave(entry)
        self._leave(entry)
        self._front -= 1
        entry.key = (1, self._front, entry.job.sequence_id)
        entry.used_s = 0.0
        self._enter(entry)
        entry.seat = self._num_left[1]
        self._queue.wait(entry, entry.location)
        reason = f"it waited {now_s - entry.last_s:.1f} s, more than {self.settings.starving_s:.1f} s"
        return LevelChange(entry.job.sequence_id, level, 1, reason)

    def _execute_s(self, entry: Entry) -> float:
        level = entry.level
        if not self.settings.enst_v2:
            return self._load.execute_s(level, self._batch)
        ahead = min(self._load.counts[level] - 1, max(0, entry.seat - self._num_left[level]))
        return self._load.execute_s_v2(level, self._batch, ahead)

    def _execute_of_key_s(self, key: Key) -> float:
        return self._execute_s(self._queue.entries[key[2]])

    def _soon_promoted(self, now_s: float) -> list[tuple[float, Key]]:
        """Those whose promotion comes before their turn."""
        promoted = self._line.expected_s(self._scan_s(), self._period_s(), now_s=now_s)
        return [(promote_s, entry.key) for entry, promote_s in promoted if promote_s < self._execute_s(entry)]

    def _scan_s(self) -> float:
        return max(0, self._iterations_to_scan) * self._iteration_s

    def _period_s(self) -> float:
        return self.settings.promote_period * self._iteration_s


def _with_promotions(decision: IterationDecision, promoted: tuple[LevelChange, ...]) -> IterationDecision:
    if not promoted:
        return decision
    names = ", ".join(change.sequence_id for change in promoted)
    return replace(decision, promoted=promoted, reason=f"{decision.reason}, promoted {names}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
