"""Who waits and who runs: the iteration scheduler is asked, and what it decides is done.

A sequence waits without KV, runs, is paused (its KV stays on the device), is swapped out (its KV is in host
memory), or moves between the two; where its KV is, the sequence itself knows. Nothing here grows with the
number of those that wait: the scheduler keeps them in order and asks for those that it considers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile

from trireme.engine.batch import Part
from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_preloads import KvPreloads
from trireme.engine.kv_swaps import KvSwaps
from trireme.engine.kv_view import view_of
from trireme.engine.pace import Pace
from trireme.engine.sequence import Sequence
from trireme.engine.settings import EngineSettings
from trireme.engine.tally import StepReport, Tally
from trireme.policies.iteration import Budget, IterationDecision, Job, Location, Run, SequenceView
from trireme.policies.schedulers import make_scheduler


class Roster:
    """All sequences of an engine."""

    def __init__(self, cache: KvCache, preloads: KvPreloads, settings: EngineSettings, tally: Tally) -> None:
        self._cache = cache
        self._preloads = preloads
        self._swaps = KvSwaps(cache)
        self._settings = settings
        self._tally = tally
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._scheduler = make_scheduler(settings.policy, settings=settings.mlfq)
        self._pace = Pace(self._scheduler) if settings.policy == "mlfq" else None
        self._everybody: dict[str, Sequence] = {}
        self._new: dict[str, Sequence] = {}
        """Came since the last step; the scheduler does not know them yet."""
        self.running: dict[str, Sequence] = {}
        """The last step's batch, without those that have ended."""
        self._ran: list[Run] = []
        """The step's batch, to be charged at its end."""
        self._paused: set[str] = set()
        self._swapped: set[str] = set()
        self._arriving: set[str] = set()
        """On their way back to the device, or just there."""

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the batch, with KV or without."""
        return len(self._everybody) - len(self.running)

    @property
    def num_paused(self) -> int:
        """Those of them that keep their KV on the device."""
        return len(self._paused)

    @property
    def num_swapped(self) -> int:
        """Those of them whose KV is in host memory, or on its way there."""
        return len(self._swapped)

    def upcoming(self) -> Iterator[Sequence]:
        """Those that wait and that the scheduler knows, next first, lazily."""
        return map(self._everybody.__getitem__, self._scheduler.order())

    def next_use_s(self, sequence: Sequence, *, now_s: float) -> float:
        """Seconds until it is expected to run."""
        return self._scheduler.next_use_s(sequence.sequence_id, now_s=now_s)

    def add(self, sequence: Sequence) -> None:
        """Let it wait."""
        self._everybody[sequence.sequence_id] = self._new[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """It ends, wherever it stands: its blocks go back."""
        name = sequence.sequence_id
        if self._everybody.pop(name, None) is not None:
            self._new.pop(name, None)
            self.running.pop(name, None)
            for states in (self._paused, self._swapped, self._arriving):
                states.discard(name)
            self._scheduler.remove(name)
        self._preloads.withdraw(sequence)
        self._cache.release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """A sequence gives up its KV and waits again; the scheduler finds that out by itself."""
        name = sequence.sequence_id
        self._tally.preemptions += name not in self._paused
        self.running.pop(name, None)
        self._paused.discard(name)
        self._arriving.discard(name)
        self._cache.release(sequence)

    def schedule(self, report: StepReport, *, now_s: float) -> list[Part]:
        """Ask the scheduler and do what it says; what runs is returned, single tokens first."""
        self._tell_of_new(now_s)
        self._start_loads()
        decision = self._scheduler.decide(self._budget(), self._view, now_s=now_s)
        report.decided(decision)
        self._tally.promotions += len(decision.promoted)
        self._stop(decision)
        parts = self._parts(decision, report)
        for name in decision.swap_in:
            # What the scheduler counted on may be gone by now: then it waits for the next step.
            if self._swaps.swap_in(self._everybody[name]):
                self._swapped.discard(name)
                self._arriving.add(name)
        self._rest_arrived()
        return parts

    def charge(self, seconds: float, report: StepReport, *, now_s: float) -> None:
        """The step that `schedule` began has taken so long."""
        if not self._ran:
            return
        ran = self._ran
        if report.drafted:
            right = report.right
            ran = [Run(name, count + right.get(name, 0)) for name, count in ran]
        elif self._pace is not None:  # what a step without drafts takes
            self._pace.observe(seconds)
        changes = self._scheduler.charge(ran, seconds, now_s=now_s)
        if changes:
            self._tally.demotions += len(changes)
            report.demoted(changes)

    def _tell_of_new(self, now_s: float) -> None:
        for sequence in self._new.values():
            self._scheduler.add(self._job(sequence, now_s), now_s=now_s)
        self._new.clear()

    def _job(self, sequence: Sequence, now_s: float) -> Job:
        cache = self._cache
        hashes = cache.hashes(sequence, sequence.reusable_tokens)
        num_found = len(cache.match(sequence))
        if sequence.stored:
            offered = {block.block_hash for block in sequence.stored}
            num_found += sum(1 for _ in takewhile(offered.__contains__, hashes[num_found:]))
        cached_tokens = max(num_found * cache.block_size, sequence.awaited_tokens)
        return Job(
            sequence_id=sequence.sequence_id,
            arrival_s=now_s if sequence.arrival_s is None else sequence.arrival_s,
            priority=sequence.priority,
            new_tokens=max(1, sequence.num_target - cached_tokens),
            cached_tokens=cached_tokens,
            urgency=sequence.request.urgency,
        )

    def _start_loads(self) -> None:
        if not self._preloads.has_offers:
            return
        following = islice(self._scheduler.order(), self._settings.admission_window)
        waiting = [
            sequence
            for sequence in map(self._everybody.__getitem__, following)
            if sequence.location is Location.NONE
        ]
        self._preloads.start(waiting, reserve=self._watermark_blocks if self.running else 0)

    def _budget(self) -> Budget:
        cache, settings = self._cache, self._settings
        host = cache.host
        bytes_per_s = cache.copies.in_bytes_per_s
        block_bytes = cache.memory.block_bytes
        return Budget(
            token_budget=settings.max_batch_tokens,
            max_sequences=settings.max_num_seqs,
            free_blocks=cache.pool.num_available,
            draining_blocks=cache.pool.num_draining,
            host_free_blocks=host.pool.num_available if host is not None else 0,
            host_blocks=host.pool.num_blocks if host is not None else 0,
            watermark_blocks=self._watermark_blocks,
            max_passes=settings.max_passes,
            link_blocks_per_s=bytes_per_s / block_bytes if bytes_per_s and block_bytes else float("inf"),
        )

    def _view(self, sequence_id: str) -> SequenceView:
        return view_of(self._cache, self._everybody[sequence_id])

    def _stop(self, decision: IterationDecision) -> None:
        for name, _ in decision.evicted:
            self.preempt(self._everybody[name])
            self._tally.evictions += 1
        for name, _ in decision.swap_out:
            self._swap_out(self._everybody[name])
        for name, _ in decision.paused:
            sequence = self._everybody[name]
            if sequence.location is Location.DEVICE and name not in self._paused:
                self._cache.pause(sequence)
                self._paused.add(name)
                self._tally.preemptions += 1

    def _swap_out(self, sequence: Sequence) -> None:
        name = sequence.sequence_id
        if self._swaps.swap_out(sequence):
            self._tally.preemptions += name not in self._paused
            self._paused.discard(name)
            self._arriving.discard(name)
            self._swapped.add(name)
        elif sequence.load is None:
            # Blocks that it shares cost nothing here, but room there: the host is fuller than was thought.
            self.preempt(sequence)
            self._tally.evictions += 1

    def _parts(self, decision: IterationDecision, report: StepReport) -> list[Part]:
        singles: list[Part] = []
        chunks: list[Part] = []
        running: dict[str, Sequence] = {}
        self._ran = []
        for name, num_tokens in decision.runs:
            sequence = self._everybody[name]
            if sequence.location is Location.NONE:
                # What the scheduler counted on may be gone by now: then it waits for the next step.
                if not self._admit(sequence, report):
                    continue
            elif not self._cache.grow(sequence, sequence.num_target):
                continue
            elif name in self._paused:
                self._paused.discard(name)
                self._cache.expect(sequence)
            count = min(num_tokens, sequence.num_target - sequence.num_computed)
            running[name] = sequence
            self._ran.append(Run(name, count))
            (singles if count == 1 else chunks).append(Part(sequence, count))
        self.running = running
        parts = singles + chunks
        if self._pace is not None:
            self._pace.begin(parts)
        return parts

    def _admit(self, sequence: Sequence, report: StepReport) -> bool:
        if not self._cache.admit(sequence):
            return False
        self._preloads.withdraw(sequence)
        for states in (self._paused, self._swapped, self._arriving):
            states.discard(sequence.sequence_id)  # a copy may have lost what it had
        found = sequence.num_computed
        self._tally.prefix_query_tokens += sequence.reusable_tokens
        self._tally.prefix_hit_tokens += found
        if sequence.most_computed == 0:
            sequence.cached_tokens = found
        sequence.most_computed = max(sequence.most_computed, found)
        report.admitted.append(sequence.request.sequence_id)
        return True

    def _rest_arrived(self) -> None:
        """Those that came back before their turn are paused: others must not wait for their blocks."""
        for name in list(self._arriving):
            sequence = self._everybody[name]
            if sequence.location is Location.MOVING:
                continue
            self._arriving.discard(name)
            if sequence.location is Location.DEVICE and name not in self.running:
                self._cache.pause(sequence)
                self._paused.add(name)
