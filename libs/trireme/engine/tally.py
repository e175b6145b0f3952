"""What a step did, for its result and for the counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field

from trireme.engine.batch import Part
from trireme.engine.outputs import (
    EmbeddingOutput,
    EventKind,
    ScoreOutput,
    SequenceEvent,
    SequenceWork,
    StepResult,
    TokenOutput,
)
from trireme.engine.sequence import Sequence
from trireme.policies.iteration import IterationDecision, LevelChange

MAX_EVENTS = 64
"""Events told of one step."""


@dataclass(slots=True)
class Tally:
    """Counters since the engine was built."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    errors: int = 0
    preemptions: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0
    recomputed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    graph_steps: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class StepReport:
    """One step's result while it is made."""

    outputs: list[TokenOutput]
    scores: list[ScoreOutput] = field(default_factory=list)
    embeddings: list[EmbeddingOutput] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    events: list[SequenceEvent] = field(default_factory=list)
    work: list[tuple[str, int, int]] = field(default_factory=list)
    """(request's id, prefill tokens, decode tokens) of each part."""
    drafted: dict[str, int] = field(default_factory=dict)
    """By request: tokens that were verified."""
    right: dict[str, int] = field(default_factory=dict)
    """By request: those of them that were taken."""
    recomputed_tokens: int = 0
    reason: str = ""

    def decided(self, decision: IterationDecision) -> None:
        """Keep what the policy said."""
        self.reason = decision.reason
        for kind, stopped in (
            (EventKind.PAUSED, decision.paused),
            (EventKind.SWAPPED_OUT, decision.swap_out),
            (EventKind.EVICTED, decision.evicted),
        ):
            for sequence_id, why in stopped:
                self._note(sequence_id, kind, why)
        for sequence_id in decision.swap_in:
            self._note(sequence_id, EventKind.SWAPPED_IN, "it runs soon")
        for change in decision.promoted:
            self._note(change.sequence_id, EventKind.PROMOTED, change.reason)

    def demoted(self, changes: Iterable[LevelChange]) -> None:
        """Keep who went down a level."""
        for change in changes:
            self._note(change.sequence_id, EventKind.DEMOTED, change.reason)

    def _note(self, sequence_id: str, kind: EventKind, reason: str) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(SequenceEvent(sequence_id.partition("\0")[0], kind, reason))

    def computing(self, parts: Iterable[Part]) -> None:
        """Count the tokens of the step's parts, before they are computed."""
        for sequence, num_tokens in parts:
            start = sequence.num_computed
            self.recomputed_tokens += max(0, min(sequence.most_computed - start, num_tokens))
            decode = int(sequence.has_answered and start + num_tokens == len(sequence.token_ids))
            self.work.append((sequence.request.sequence_id, num_tokens - decode, decode))

    def verifying(self, drafts: Mapping[Sequence, Sized]) -> None:
        """Count the tokens that are computed to be verified. A sequence that decodes is its request."""
        for sequence, tokens in drafts.items():
            self.drafted[sequence.sequence_id] = len(tokens)

    def accepted(self, sequence: Sequence, num_right: int) -> None:
        """Of those so many are in the answer."""
        self.right[sequence.sequence_id] = num_right

    def result(self, tally: Tally, seconds: float) -> StepResult:
        """Close the step and add it to the counters. Who was drafted for in vain pays for it."""
        prefill = decode = 0
        for _, prefill_tokens, decode_tokens in self.work:
            prefill += prefill_tokens
            decode += decode_tokens
        drafted, right = self.drafted, self.right
        num_drafted, num_right = sum(drafted.values()), sum(right.values())
        per_token_s = seconds / max(1, prefill + decode + num_drafted)
        decode += num_right
        tally.drafted_tokens += num_drafted
        tally.accepted_tokens += num_right
        tally.prefill_tokens += prefill
        tally.decode_tokens += decode
        tally.recomputed_tokens += self.recomputed_tokens
        tally.steps += 1
        tally.busy_s += seconds
        return StepResult(
            outputs=tuple(self.outputs),
            scores=tuple(self.scores),
            embeddings=tuple(self.embeddings),
            work=tuple(
                [
                    SequenceWork(
                        sequence_id,
                        prefill_tokens,
                        decode_tokens + right.get(sequence_id, 0),
                        per_token_s * (prefill_tokens + decode_tokens + drafted.get(sequence_id, 0)),
                    )
                    for sequence_id, prefill_tokens, decode_tokens in self.work
                ]
            ),
            admitted=tuple(self.admitted),
            events=tuple(self.events),
            recomputed_tokens=self.recomputed_tokens,
            drafted_tokens=num_drafted,
            accepted_tokens=num_right,
            seconds=seconds,
            reason=self.reason,
        )
