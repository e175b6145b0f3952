"""One request in flight, as its gateway knows it: what arrived, from which attempt, for whom.

Pure: no I/O and no clock but the one passed in. Workers repeat themselves (after an Attach, after a
crash) and may be late; tokens are taken by index, each once and in order, and only from the
present attempt.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trireme.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    RequestCancelled,
    RequestFailed,
    TriremeError,
)
from trireme.gateway.detokenizer import Detokenizer
from trireme.gateway.events import Paused
from trireme.gateway.stop_strings import StopMatcher
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.inference.v1.inference_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    PositionLogprobs,
    TokenIds,
    TokenLogprob,
    Usage,
)
from trireme.wire.worker.v1.worker_pb2 import EngineTimes, SequenceUpdate

MAX_EVENTS = 64
"""Of one request; further ones are forgotten."""

_ENGINE_ERRORS: dict[str, type[TriremeError]] = {
    error.code: error for error in (ContextLengthExceeded, InvalidRequest, ModelNotFound, RequestCancelled)
}
"""What an engine may say of one request; everything else is RequestFailed."""


class Applied(enum.Enum):
    """What became of an update."""

    TAKEN = "taken"
    STALE = "stale"
    """From an older attempt: dropped."""
    GAP = "gap"
    """Tokens before it are missing: dropped; ask for a replay."""
    STOP_CHOICE = "stop_choice"
    """Taken, and a stop string ended the choice here: tell the worker."""


class Choice:
    """One answer: tokens by index, the text that each completed, and its end."""

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_min_tokens",
        "_stop_token_ids",
        "logprobs",
        "prompt_logprobs",
        "reason",
        "stop_string",
        "tail",
        "texts",
        "token_ids",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self.token_ids = array("I")
        self.texts: list[str] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: Sequence[Any] = ()
        """Of the prompt's tokens but the first, where asked for."""
        self.tail = ""
        """Text that was still held back at the end."""
        self.reason: FinishReason.ValueType = FINISH_REASON_UNSPECIFIED
        self.stop_string = ""
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens

    @property
    def ended(self) -> bool:
        return self.reason != FINISH_REASON_UNSPECIFIED

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[Any] = ()) -> bool:
        """Take the next tokens; True where a stop string ended the choice at one of them."""
        push, texts = self._detokenizer.push, self.texts
        first = len(self.token_ids)
        if self._matcher is None and not self._stop_token_ids:
            self.token_ids.extend(token_ids)
            texts.extend([push(token_id) for token_id in token_ids])
            self.logprobs.extend(logprobs)
            return False
        for position, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            counts = first + position >= self._min_tokens
            text = "" if counts and token_id in self._stop_token_ids else push(token_id)
            if self._matcher is not None and counts:
                text, stop = self._matcher.push(text)
                if stop is not None:
                    texts.append(text)
                    self.logprobs.extend(logprobs[: position + 1])
                    self.reason, self.stop_string = FINISH_REASON_STOP, stop
                    return True
            texts.append(text)
        self.logprobs.extend(logprobs)
        return False

    def append(self, token_id: int) -> bool:
        """Take the next token, which has no log-probability; True where a stop string ended the choice."""
        if self._matcher is not None or self._stop_token_ids:
            return self.extend((token_id,))
        self.token_ids.append(token_id)
        self.texts.append(self._detokenizer.push(token_id))
        return False

    def finish(self, reason: FinishReason.ValueType) -> None:
        """End the choice; what was held back is shown."""
        tail = self._detokenizer.finish()
        if self._matcher is not None:
            shown, stop = self._matcher.push(tail)
            tail = shown if stop is not None else shown + self._matcher.finish()
        self.tail = tail
        self.reason = reason


class Lane(NamedTuple):
    """A choice as one worker's columns name it."""

    live: LiveRequest
    number: int
    choice: Choice
    attempt: int
    worker_id: str


class LiveRequest:
    """A request that some client of this gateway waits for."""

    def __init__(self, admitted: AdmittedRequest, choices: Sequence[Choice], *, now_s: float) -> None:
        """`admitted` as it stands on the bus; `now_s` is monotonic."""
        self.admitted = admitted
        self.request_id = admitted.request_id
        self.attempt = admitted.attempt
        self.choices = tuple(choices)
        self.worker_id = ""
        """Who sent news of the present attempt last; empty: nobody yet."""
        self.admitted_at = ""
        """The worker whose engine took the present attempt."""
        self.variant = ""
        self.decision = ""
        self.started_unix_s = 0.0
        self.times = EngineTimes()
        """When scheduler and worker did what; the first token is the first one of all attempts."""
        self.events: list[tuple[float, str, str]] = []
        """(monotonic seconds, name, detail) of what befell it."""
        self.usage: Usage | None = None
        self.scores: tuple[float, ...] = ()
        self.embedding: tuple[float, ...] = ()
        self.error: TriremeError | None = None
        self.pauses: list[Paused] = []
        self.paused_since_s: float | None = None
        self.paused_s = 0.0
        self.last_news_s = now_s
        self.next_check_s = 0.0
        self.ended_s: float | None = None
        """When the last choice ended."""
        self.unknown_since_s: float | None = None
        """Since when the worker that should have it says that it does not."""
        self.lanes: list[tuple[str, int]] = []
        """(worker id, lane): how workers' columns name its choices."""
        self.listeners: list[Callable[[bool], None]] = []
        """Called after news; True where it should not wait to be merged with more."""
        self._open_choices = len(self.choices)

    @property
    def ended(self) -> bool:
        """All choices ended, or the request failed."""
        return self._open_choices == 0 or self.error is not None

    @property
    def accounted(self) -> bool:
        """Ended, and the worker said what was used."""
        return self.error is not None or (self._open_choices == 0 and self.usage is not None)

    def preload(self, delivered: Sequence[TokenIds], now_s: float) -> None:
        """Take tokens that another gateway had delivered, from the request's record."""
        wants_logprobs = self.admitted.sampling.HasField("logprobs")
        for choice, tokens in zip(self.choices, delivered, strict=False):
            unknown = [PositionLogprobs(chosen=TokenLogprob(token_id=t)) for t in tokens.ids]
            if choice.extend(tokens.ids, unknown if wants_logprobs else ()):
                self._choice_ended(now_s)

    def received(self) -> list[int]:
        """Tokens received, per choice."""
        return [len(choice.token_ids) for choice in self.choices]

    def apply(self, update: SequenceUpdate, worker_id: str, now_s: float) -> Applied:
        """Take one update."""
        if update.attempt != self.attempt:
            if update.attempt < self.attempt:
                return Applied.STALE
            self.enter_attempt(update.attempt, now_s)
        self.last_news_s = now_s
        self.unknown_since_s = None
        self.worker_id = worker_id
        if update.HasField("admitted"):
            self.admitted_at = worker_id
            self.variant = update.admitted.variant
            self.decision = update.admitted.decision
            if update.admitted.started_unix_s and not self.started_unix_s:
                self.started_unix_s = update.admitted.started_unix_s
        if update.HasField("times"):
            self._take_times(update.times)
        if update.choice >= len(self.choices):
            return Applied.STALE
        choice = self.choices[update.choice]
        outcome = Applied.TAKEN
        if not choice.ended:
            if update.prompt_logprobs and not choice.prompt_logprobs:
                choice.prompt_logprobs = update.prompt_logprobs
            have = len(choice.token_ids)
            first = update.first_index
            if first > have:
                return Applied.GAP
            new = update.token_ids[have - first :]
            if new:
                self._go_on(now_s)
                if choice.extend(new, update.logprobs[have - first :]):
                    self._choice_ended(now_s)
                    outcome = Applied.STOP_CHOICE
            if not choice.ended and update.HasField("finished"):
                self._finish(choice, update, now_s)
        if update.HasField("usage"):
            self.usage = update.usage
            self.scores = tuple(update.scores)
            self.embedding = tuple(update.embedding)
        self.notify(urgent=self.ended)
        return outcome

    def take(self, lane: Lane, index: int, token_id: int, now_s: float) -> Applied:
        """Take one plain token: what `apply` does with an update that has nothing else."""
        if lane.attempt != self.attempt:
            return Applied.STALE
        self.last_news_s = now_s
        self.unknown_since_s = None
        self.worker_id = lane.worker_id
        choice = lane.choice
        outcome = Applied.TAKEN
        if not choice.ended:
            have = len(choice.token_ids)
            if index > have:
                return Applied.GAP
            if index < have:
                return Applied.TAKEN
            self._go_on(now_s)
            if choice.append(token_id):
                self._choice_ended(now_s)
                outcome = Applied.STOP_CHOICE
        for listener in self.listeners:
            listener(self.ended)
        return outcome

    def note(self, name: str, now_s: float, detail: str = "") -> None:
        """Something befell the request that its timeline should tell."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((now_s, name, detail))

    def _go_on(self, now_s: float) -> None:
        if self.paused_since_s is not None:
            self.paused_s += now_s - self.paused_since_s
            self.paused_since_s = None
            self.note("resumed", now_s)

    def _take_times(self, times: EngineTimes) -> None:
        """A later attempt only goes on where one before it made tokens: its beginning is no new one."""
        before = self.times
        self.times = EngineTimes()
        self.times.CopyFrom(times)
        if before.first_token_unix_s and before.first_token_unix_s != times.first_token_unix_s:
            for name in ("assigned_unix_s", "received_unix_s", "started_unix_s", "first_token_unix_s"):
                setattr(self.times, name, getattr(before, name))

    def _finish(self, choice: Choice, update: SequenceUpdate, now_s: float) -> None:
        if update.finished.reason == FINISH_REASON_ERROR:
            message = update.finished.error_message or "the engine failed on this request"
            self.fail(_ENGINE_ERRORS.get(update.finished.error_code, RequestFailed)(message))
            return
        choice.finish(update.finished.reason)
        self._choice_ended(now_s)

    def _choice_ended(self, now_s: float) -> None:
        self._open_choices -= 1
        if self._open_choices == 0:
            self.ended_s = now_s

    def enter_attempt(self, attempt: int, now_s: float) -> None:
        """From now on only this attempt counts; who serves it is not known yet."""
        self.note("attempt", now_s, str(attempt))
        self.attempt = attempt
        self.admitted.attempt = attempt
        self.worker_id = ""
        self.admitted_at = ""
        self.unknown_since_s = None
        self.last_news_s = now_s
        self.next_check_s = 0.0

    def pause(self, reason: str, now_s: float) -> None:
        """Tell the client that a fault delays its answer."""
        if self.paused_since_s is None:
            self.paused_since_s = now_s
            self.note("paused", now_s, reason)
        self.pauses.append(Paused(reason))
        self.notify(urgent=True)

    def fail(self, error: TriremeError) -> None:
        """End the request with an error; the first one counts."""
        if self.error is None:
            self.error = error
        self.notify(urgent=True)

    def again(self, *, gateway_id: str, avoid_worker_id: str = "") -> AdmittedRequest:
        """The request to queue again: with what was delivered, for this gateway."""
        request = AdmittedRequest()
        request.CopyFrom(self.admitted)
        request.gateway_id = gateway_id
        del request.delivered[:]
        for choice in self.choices:
            request.delivered.add(ids=choice.token_ids)
        if avoid_worker_id and avoid_worker_id not in request.avoid_worker_ids:
            request.avoid_worker_ids.append(avoid_worker_id)
        return request

    def notify(self, *, urgent: bool) -> None:
        """Wake whoever waits for news."""
        for listener in self.listeners:
            listener(urgent)
