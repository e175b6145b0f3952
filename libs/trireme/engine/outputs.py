"""What a step gives back."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from trireme.errors import RequestFailed, TriremeError


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """It chose an end-of-sequence or stop token, which is the last token, or its constraint is met and allows
    nothing more."""
    LENGTH = "length"
    """It has `max_tokens`, or fills the model's context."""
    ERROR = "error"
    """The engine failed on this sequence alone."""


TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and (token id, log-probability) of the likeliest in its place."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """News of a generating sequence, or the error that ended any sequence."""

    sequence_id: str
    index: int
    """Place of the token in the answer, delivered ones included."""
    token_id: int | None
    """None if the sequence ended without another token."""
    logprob: float | None = None
    """Of the chosen token, where asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest, where asked for."""
    finish_reason: FinishReason | None = None
    error: TriremeError | None = None
    cached_tokens: int | None = None
    """With the sequence's first output: tokens whose KV was found and not computed."""
    dropped_tokens: int | None = None
    """Where it has changed: oldest tokens that have gone since the request came, delivered ones included."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the sequence's first output, where asked for: of the prompt's tokens but the first."""


class ScoreOutput(NamedTuple):
    """The end of a SCORE sequence."""

    sequence_id: str
    logprobs: tuple[float, ...]
    """Per continuation, the sum of its tokens' log-probabilities."""
    cached_tokens: int
    """Prompt tokens whose KV was found, summed over the continuations."""


class EmbeddingOutput(NamedTuple):
    """The end of an EMBED sequence."""

    sequence_id: str
    vector: tuple[float, ...]
    """Mean of the prompt's final hidden states, scaled to length 1."""
    cached_tokens: int
    """0: every hidden state is needed, so all are computed."""


class SequenceWork(NamedTuple):
    """What one sequence cost in one step. A SCORE request has an entry per continuation that ran."""

    sequence_id: str
    prefill_tokens: int
    """Tokens computed other than the one below: the prompt's, and any computed again."""
    decode_tokens: int
    """1 if the newest token of the answer was computed."""
    seconds: float
    """Share of the step's time, in proportion to tokens computed."""


class EventKind(enum.StrEnum):
    """What happened to a sequence between two iterations."""

    PAUSED = "paused"
    """Others ran instead; its KV stayed on the device."""
    SWAPPED_OUT = "swapped_out"
    """Its KV goes to host memory."""
    EVICTED = "evicted"
    """Its KV was given up; it is computed again."""
    SWAPPED_IN = "swapped_in"
    """Its KV comes back."""
    DEMOTED = "demoted"
    """To a lower level of the queue."""
    PROMOTED = "promoted"
    """To the highest."""


class SequenceEvent(NamedTuple):
    """One of these, and why."""

    sequence_id: str
    kind: EventKind
    reason: str
    """One line."""


_STOPPED = (EventKind.PAUSED, EventKind.SWAPPED_OUT, EventKind.EVICTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step. The seconds of `work` sum to `seconds`."""

    outputs: tuple[TokenOutput, ...] = ()
    scores: tuple[ScoreOutput, ...] = ()
    embeddings: tuple[EmbeddingOutput, ...] = ()
    work: tuple[SequenceWork, ...] = ()
    admitted: tuple[str, ...] = ()
    """Sequences that began or began again in this step."""
    events: tuple[SequenceEvent, ...] = ()
    """The first `tally.MAX_EVENTS` of the step."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    drafted_tokens: int = 0
    """Tokens that were drafted and verified; they are in no other count."""
    accepted_tokens: int = 0
    """Those of them that were right: they are among the outputs and in `work`."""
    seconds: float = 0.0
    reason: str = ""
    """The iteration policy's line."""

    @property
    def preempted(self) -> tuple[tuple[str, str], ...]:
        """(sequence id, reason) of those that stopped."""
        return tuple([(event.sequence_id, event.reason) for event in self.events if event.kind in _STOPPED])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges now, and counters since the engine was built."""

    waiting: int
    """Not in the last batch, with KV or without."""
    running: int
    kv_blocks_used: int
    """Held by sequences."""
    kv_blocks_total: int
    kv_blocks_cached: int
    """Complete and findable, held or not."""
    prefix_query_tokens: int
    """Tokens that admissions looked for in the cache."""
    prefix_hit_tokens: int
    prefill_tokens: int
    decode_tokens: int
    output_tokens: int
    finished: int
    errors: int
    preemptions: int
    """Times that a sequence had to stop before its end."""
    recomputed_tokens: int
    steps: int
    busy_s: float
    paused: int = 0
    """Of those that wait, those with KV on the device."""
    swapped: int = 0
    """Of those that wait, those with KV in host memory or on its way there."""
    evictions: int = 0
    """Preemptions that gave the KV up, because the host had no room for it."""
    demotions: int = 0
    promotions: int = 0
    kv_blocks_draining: int = 0
    """Given up, but a copy still touches them."""
    host_blocks_used: int = 0
    """Host blocks that swapped sequences hold, or that a copy still touches."""
    host_blocks_total: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    swap_out_s: float = 0.0
    """Time of the copies to the host, which run beside the steps."""
    swap_in_s: float = 0.0
    lost_sequences: int = 0
    """Sequences whose KV a copy lost: computed again."""
    context_cuts: int = 0
    """Times that a sequence lost its oldest tokens while it was answered."""
    rerotated_blocks: int = 0
    """Blocks whose keys were turned to other positions instead of being computed."""
    preload_blocks: int = 0
    """Stored blocks that were loaded."""
    preload_corrupt: int = 0
    """Stored blocks that were short or damaged: they and what followed them were computed."""
    stall_s: float = 0.0
    """Time that steps waited for layers on their way."""
    host_in_bytes_per_s: float = 0.0
    """Measured speed of copies to the device; 0: there was none."""
    host_out_bytes_per_s: float = 0.0
    drafted_tokens: int = 0
    """Tokens that were drafted and verified."""
    accepted_tokens: int = 0
    """Those of them that the answers took."""
    graph_steps: int = 0
    """Steps that were replayed from a captured graph."""


def not_a_number() -> RequestFailed:
    """What ends a sequence whose scores cannot be used."""
    return RequestFailed("the model's scores are not finite numbers for this sequence")
