"""The requests a worker has: what was made of them, and who wants it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from trireme.runtime.spans import Moment
from trireme.wire.bus.v1.facts_pb2 import Assignment
from trireme.wire.inference.v1.inference_pb2 import PositionLogprobs, Usage
from trireme.wire.worker.v1.worker_pb2 import Admitted, EngineTimes, Finished, SequenceUpdate

UPDATE_TOKENS = 8192
"""Tokens in one update at most."""
MAX_STOPS = 16
"""Preemptions of one request that are told one by one."""
UPDATE_LOGPROBS = 16384
"""Log-probabilities in one update at most, alternatives included; each has about a dozen bytes."""


@dataclass(slots=True)
class Columns:
    """Plain tokens on their way to one gateway, a row each."""

    lanes: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """One answer in the making."""

    first_index: int
    """Index in the answer of `token_ids[0]`: earlier ones were delivered in an earlier attempt."""
    handle: int = 0
    """The engine process's name for it, and its lane to gateways; the request table gives it."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """Of the prompt's tokens but the first, where asked for."""
    finished: Finished | None = None
    dropped_tokens: int = 0
    """Oldest ones, of prompt and answer, that have gone because the context was full."""
    sent: int = 0
    """Tokens given to the present gateway's stream."""
    finish_sent: bool = False
    lane_sent: bool = False
    """The present gateway knows its lane."""
    prompt_sent: bool = False


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One attempt of one request, from its admission until its end is confirmed."""

    assignment: Assignment
    entry_id: bytes
    gateway_id: str
    choices: list[Choice]
    work_tokens: int
    engine_s: float = 0.0
    joules: float = 0.0
    grams_co2e: float = 0.0
    cached_prompt_tokens: int = 0
    started_unix_s: float = 0.0
    first_token_unix_s: float = 0.0
    received_unix_s: float = field(default_factory=time.time)
    """When its assignment was read."""
    ended_unix_s: float = 0.0
    kv_load: tuple[float, float] = (0.0, 0.0)
    """From when until when stored blocks were sought for it and kept in place."""
    kv_loaded_blocks: int = 0
    num_stops: int = 0
    """Times it was preempted, as far as the engine told of them."""
    stops: list[Moment] = field(default_factory=list)
    """The first of them."""
    ended_s: float | None = None
    """Monotonic; None while a choice goes on."""
    scores: tuple[float, ...] = ()
    embedding: tuple[float, ...] = ()
    announced: bool = False
    last_wanted_s: float = field(default_factory=time.monotonic)
    """When its gateway was last connected."""
    request_id: str = field(init=False)
    variant: str = field(init=False)
    wants_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        # Read for each token: not to be asked of a message each time.
        self.request_id = self.assignment.request.request_id
        self.variant = self.assignment.variant
        sampling = self.assignment.request.sampling
        self.wants_logprobs = sampling.HasField("logprobs") or sampling.HasField("prompt_logprobs")

    @property
    def handles(self) -> tuple[int, ...]:
        """Of all choices, for the engine process."""
        return tuple(choice.handle for choice in self.choices)

    @property
    def is_complete(self) -> bool:
        return all(choice.finished is not None for choice in self.choices)

    def note_stop(self, kind: str, reason: str) -> None:
        """It was preempted just now."""
        self.num_stops += 1
        if len(self.stops) < MAX_STOPS:
            self.stops.append(
                Moment("preempted", time.time(), {"trireme.kind": kind, "trireme.detail": reason})
            )

    def times(self) -> EngineTimes:
        """When what happened, as far as it has."""
        return EngineTimes(
            assigned_unix_s=self.assignment.assigned_unix_s,
            received_unix_s=self.received_unix_s,
            started_unix_s=self.started_unix_s,
            first_token_unix_s=self.first_token_unix_s,
            ended_unix_s=self.ended_unix_s,
            kv_load_s=self.kv_load[1] - self.kv_load[0],
            kv_loaded_blocks=self.kv_loaded_blocks,
            preemptions=self.num_stops,
        )

    def usage(self) -> Usage:
        """What it used so far, in this attempt; delivered tokens of earlier ones count as answer."""
        truncation = self.assignment.request.truncation
        dropped_tokens = truncation.cuts[-1] - truncation.head_tokens if truncation.cuts else 0
        return Usage(
            prompt_tokens=len(self.assignment.request.prompt_token_ids),
            cached_prompt_tokens=self.cached_prompt_tokens,
            truncated_tokens=dropped_tokens + sum(choice.dropped_tokens for choice in self.choices),
            completion_tokens=sum(choice.first_index + len(choice.token_ids) for choice in self.choices),
            engine_s=self.engine_s,
            joules=self.joules,
            grams_co2e=self.grams_co2e,
        )

    def rewind(self) -> None:
        """Everything must be sent again: another stream wants it."""
        self.announced = False
        for choice in self.choices:
            choice.sent = 0
            choice.finish_sent = False
            choice.lane_sent = False
            choice.prompt_sent = False

    @property
    def has_news(self) -> bool:
        """Something was not sent yet."""
        return not self.announced or any(
            len(choice.token_ids) > choice.sent or (choice.finished is not None and not choice.finish_sent)
            for choice in self.choices
        )

    def put_plain(self, columns: Columns) -> bool:
        """Add what was not sent yet to the columns, marked as sent.

        False, and nothing is done, where some of it is more than plain tokens of known lanes.
        """
        if not self.announced or self.wants_logprobs:
            return False
        for choice in self.choices:
            ends = choice.finished is not None and not choice.finish_sent
            fresh = len(choice.token_ids) - choice.sent
            if ends or (fresh and not choice.lane_sent) or fresh > UPDATE_TOKENS:
                return False
        for choice in self.choices:
            upto = len(choice.token_ids)
            for place in range(choice.sent, upto):
                columns.lanes.append(choice.handle)
                columns.indices.append(choice.first_index + place)
                columns.token_ids.append(choice.token_ids[place])
            choice.sent = upto
        return True

    def news(self) -> list[SequenceUpdate]:
        """What was not sent yet, marked as sent; of a long backlog the next part, as `has_news` then says."""
        updates = []
        most = self._update_tokens()
        for number, choice in enumerate(self.choices):
            fresh = len(choice.token_ids) > choice.sent
            ends = choice.finished is not None and not choice.finish_sent
            if not (fresh or ends or not self.announced):
                continue
            upto = min(len(choice.token_ids), choice.sent + most)
            update = SequenceUpdate(
                request_id=self.request_id,
                attempt=self.assignment.request.attempt,
                choice=number,
                first_index=choice.first_index + choice.sent,
                token_ids=choice.token_ids[choice.sent : upto],
                logprobs=choice.logprobs[choice.sent : upto],
                lane=choice.handle,
            )
            if choice.prompt_logprobs and not choice.prompt_sent:
                update.prompt_logprobs.extend(choice.prompt_logprobs)
                choice.prompt_sent = True
            choice.sent = upto
            choice.lane_sent = True
            if not self.announced:
                update.admitted.CopyFrom(
                    Admitted(
                        variant=self.variant,
                        decision=self.assignment.decision,
                        started_unix_s=self.started_unix_s,
                    )
                )
                update.times.CopyFrom(self.times())
                self.announced = True
            if ends and choice.finished is not None and upto == len(choice.token_ids):
                update.finished.CopyFrom(choice.finished)
                choice.finish_sent = True
            updates.append(update)
        if updates and self.is_complete and all(choice.finish_sent for choice in self.choices):
            updates[-1].usage.CopyFrom(self.usage())
            updates[-1].times.CopyFrom(self.times())
            updates[-1].scores.extend(self.scores)
            updates[-1].embedding.extend(self.embedding)
        return updates

    def _update_tokens(self) -> int:
        if not self.wants_logprobs:
            return UPDATE_TOKENS
        return max(1, UPDATE_LOGPROBS // (1 + self.assignment.request.sampling.logprobs))
