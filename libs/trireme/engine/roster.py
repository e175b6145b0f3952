"""Who waits and who runs: the state that the iteration policy sees, and its decisions applied."""

from __future__ import annotations

from bisect import insort

from trireme.engine.batch import Part
from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_preloads import KvPreloads
from trireme.engine.kv_view import view_of
from trireme.engine.sequence import Sequence
from trireme.engine.settings import EngineSettings
from trireme.engine.tally import StepReport, Tally
from trireme.policies import iteration_snapshot as iteration
from trireme.policies.iteration import Location
from trireme.policies.iteration_snapshot import (
    IterationDecision,
    IterationState,
    RunningSequence,
    WaitingSequence,
)


class Roster:
    """All sequences of an engine, by state. A sequence that waits has blocks only while some are loaded."""

    def __init__(self, cache: KvCache, preloads: KvPreloads, settings: EngineSettings, tally: Tally) -> None:
        self._cache = cache
        self._preloads = preloads
        self._settings = settings
        self._tally = tally
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._takes_over = settings.policy == "priority"
        self._schedule = iteration.schedule_priority if self._takes_over else iteration.schedule_fcfs
        self._order = iteration.priority_order if self._takes_over else iteration.fcfs_order
        self.waiting: list[Sequence] = []
        """In the policy's order."""
        self.running: dict[str, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Let it wait."""
        insort(self.waiting, sequence, key=self._order)

    def remove(self, sequence: Sequence) -> None:
        """It ends: its blocks go back."""
        if self.running.pop(sequence.sequence_id, None) is None and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._cache.release(sequence)

    def schedule(self, report: StepReport) -> list[Part]:
        """Ask the policy and do what it says; what runs is returned, single tokens first."""
        reserve = self._watermark_blocks if self.running else 0
        self._preloads.start(self.waiting[: self._settings.admission_window], reserve=reserve)
        decision = self._schedule(self._state())
        report.decided(decision)
        for sequence_id, _ in decision.preempted:
            self.preempt(self.running[sequence_id])
        if decision.passed:
            passed = set(decision.passed)
            for sequence in self.waiting:
                sequence.times_passed += sequence.sequence_id in passed
        return self._parts(decision, report)

    def _state(self) -> IterationState:
        cache = self._cache
        size = cache.block_size
        running: list[RunningSequence] = []
        for sequence in self.running.values():
            num_tokens = sequence.num_target - sequence.num_computed
            held = len(sequence.blocks)
            running.append(
                RunningSequence(
                    sequence.sequence_id,
                    sequence.arrival_s,
                    sequence.priority,
                    num_tokens,
                    -(-sequence.num_target // size) - held,
                    held,
                )
            )
        settings = self._settings
        is_full = len(running) >= settings.max_num_seqs
        candidates = () if is_full and not self._takes_over else self.waiting[: settings.admission_window]
        return IterationState(
            waiting=[self._candidate(sequence) for sequence in candidates],
            running=running,
            token_budget=self._settings.max_batch_tokens,
            max_sequences=self._settings.max_num_seqs,
            free_blocks=cache.pool.num_available,
            watermark_blocks=self._watermark_blocks,
            max_passes=self._settings.max_passes,
        )

    def _candidate(self, sequence: Sequence) -> WaitingSequence:
        view = view_of(self._cache, sequence)
        return WaitingSequence(
            sequence.sequence_id,
            sequence.arrival_s,
            sequence.priority,
            view.num_tokens,
            view.num_blocks,
            sequence.times_passed,
            view.next_block,
            view.is_block_pending or view.location is Location.MOVING,
        )

    def preempt(self, sequence: Sequence) -> None:
        """A running sequence gives up its KV and waits again."""
        del self.running[sequence.sequence_id]
        self._cache.release(sequence)
        self._tally.preemptions += 1
        insort(self.waiting, sequence, key=self._order)

    def _parts(self, decision: IterationDecision, report: StepReport) -> list[Part]:
        waiting = {}
        if decision.admitted:
            waiting = {s.sequence_id: s for s in self.waiting if s.sequence_id in decision.admitted}
        singles: list[Part] = []
        chunks: list[Part] = []
        for sequence_id, num_tokens in decision.runs:
            sequence = self.running.get(sequence_id)
            if sequence is None:
                sequence = waiting[sequence_id]
                # What the policy counted on may be gone by now: then it waits for the next step.
                if not self._admit(sequence, report):
                    continue
            elif not self._cache.grow(sequence, sequence.num_target):
                continue
            count = min(num_tokens, sequence.num_target - sequence.num_computed)
            (singles if count == 1 else chunks).append(Part(sequence, count))
        return singles + chunks

    def _admit(self, sequence: Sequence, report: StepReport) -> bool:
        if not self._cache.admit(sequence):
            return False
        self.waiting.remove(sequence)
        self.running[sequence.sequence_id] = sequence
        sequence.times_passed = 0
        found = sequence.num_computed
        self._tally.prefix_query_tokens += sequence.reusable_tokens
        self._tally.prefix_hit_tokens += found
        if sequence.most_computed == 0:
            sequence.cached_tokens = found
        sequence.most_computed = max(sequence.most_computed, found)
        report.admitted.append(sequence.request.sequence_id)
        return True
