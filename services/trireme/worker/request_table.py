"""The life of requests on this worker: from assignment to confirmed end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Container, Coroutine, Iterable

from trireme.bus.connection import persistently
from trireme.bus.request_records import RequestRecords, State
from trireme.bus.streams import Stream
from trireme.bus.waiting_work import work_tokens
from trireme.runtime.spans import Spans
from trireme.wire.bus.v1.facts_pb2 import Assignment, Event, RequestFinished
from trireme.wire.inference.v1 import inference_pb2 as inference
from trireme.wire.worker.v1.worker_pb2 import Finished
from trireme.worker.billing import Biller
from trireme.worker.live_requests import Choice, LiveRequest
from trireme.worker.outboxes import Outbox
from trireme.worker.request_spans import put_spans
from trireme.worker.step_news import Ending, Output, StepNews

log = logging.getLogger(__name__)

TOMBSTONE_S = 60.0
"""A stop for a request that is not here yet is remembered so long."""
SETTLING_S = 5.0
"""How long a leaving worker tries to make its last acknowledgements."""

_REASONS = {
    "stop": inference.FINISH_REASON_STOP,
    "length": inference.FINISH_REASON_LENGTH,
    "error": inference.FINISH_REASON_ERROR,
}
"""By the engine's word for it."""


class RequestTable:
    """Live requests by id, their choices by handle, and one outbox per gateway.

    Args:
        cancel: stops sequences of a variant in the engine: (variant, handles).
    """

    def __init__(
        self,
        *,
        worker_id: str,
        records: RequestRecords,
        events: Stream[Event],
        biller: Biller,
        spans: Spans,
        cancel: Callable[[str, tuple[int, ...]], None],
    ) -> None:
        self._worker_id = worker_id
        self._records = records
        self._events = events
        self._biller = biller
        self._spans = spans
        self._cancel = cancel
        self._live: dict[str, LiveRequest] = {}
        self._sequences: dict[int, tuple[LiveRequest, Choice]] = {}
        self._handles = itertools.count(1)  # they are lanes too, where 0 is none
        self._outboxes: dict[str, Outbox] = {}
        self._tombstones: dict[str, float] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._entries: set[bytes] = set()
        self.on_ended: Callable[[LiveRequest], None] | None = None
        """Hears of each request whose last choice has ended."""

    def __len__(self) -> int:
        return len(self._live)

    @property
    def held_entries(self) -> Container[bytes]:
        """Assignments, by entry id, that are here or on their way out."""
        return self._entries

    @property
    def computing(self) -> int:
        """Requests whose last choice has not ended."""
        return sum(request.ended_s is None for request in self._live.values())

    def outbox(self, gateway_id: str) -> Outbox:
        """The gateway's outbox, made at first use."""
        return self._outboxes.setdefault(gateway_id, Outbox(self._worker_id))

    def is_stopped(self, request_id: str) -> bool:
        """Whether a stop came before the request did."""
        return request_id in self._tombstones

    def add(self, request: LiveRequest) -> None:
        """Take a request over; a newer attempt of one that is here replaces it."""
        stale = self._live.get(request.request_id)
        if stale is not None:
            self._cancel(stale.variant, stale.handles)
            self._drop(stale)
            self.let_go(stale.entry_id, stale.assignment)
        self._entries.add(request.entry_id)
        self._live[request.request_id] = request
        for choice in request.choices:
            choice.handle = next(self._handles)
            self._sequences[choice.handle] = (request, choice)

    def holds(self, request: LiveRequest) -> bool:
        """Whether this very attempt is here."""
        return self._live.get(request.request_id) is request

    def request_of(self, handle: int) -> LiveRequest | None:
        """The request of a choice, while it is here."""
        found = self._sequences.get(handle)
        return found[0] if found is not None else None

    def choice_of(self, handle: int) -> tuple[LiveRequest, int] | None:
        """The request of a choice, and which one it is, while it is here."""
        found = self._sequences.get(handle)
        return (found[0], found[0].choices.index(found[1])) if found is not None else None

    def withdraw(self, request: LiveRequest) -> None:
        """Forget a request that the engine never had; its assignment is the caller's again."""
        self._drop(request)
        self._entries.discard(request.entry_id)

    def let_go(self, entry_id: bytes, assignment: Assignment) -> None:
        """Acknowledge, in the background, an assignment that a later attempt has overtaken."""
        self._entries.add(entry_id)
        tokens = work_tokens(assignment.request)

        async def acknowledge() -> None:
            await persistently(
                lambda: self._records.let_go(entry_id, assignment, tokens=tokens), what="let go of assignment"
            )
            self._entries.discard(entry_id)

        self._in_background(acknowledge())

    def has_attempt(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt, or a later one, is here already."""
        known = self._live.get(request_id)
        return known is not None and known.assignment.request.attempt >= attempt

    def on_step(self, news: StepNews) -> tuple[float, float]:
        """Take one step's output; returns (joules, engine seconds) billed for it."""
        now_s = time.time()
        plain: dict[LiveRequest, None] = {}
        billed_joules, billed_s = self._take_plain(news, plain)
        rare: dict[LiveRequest, None] = {}
        for handle, seconds in news.work:
            request = self.request_of(handle)
            if request is None:
                continue
            joules, grams = self._biller.price(seconds)
            request.engine_s += seconds
            request.joules += joules
            request.grams_co2e += grams
            billed_joules += joules
            billed_s += seconds
            if not request.started_unix_s:
                request.started_unix_s = now_s - news.seconds
        for output in news.outputs:
            found = self._sequences.get(output.handle)
            if found is not None:
                self._take(*found, output, now_s)
                rare[found[0]] = None
        for ending in news.endings:
            found = self._sequences.get(ending.handle)
            if found is not None:
                _take_ending(*found, ending)
                rare[found[0]] = None
        for gateway_id, requests in _by_gateway(plain).items():
            self.outbox(gateway_id).mark_soon(requests)
        for gateway_id, requests in _by_gateway(rare).items():
            self.outbox(gateway_id).mark(*requests)
        # After the marks: the client's tokens go first, the fleet's records of them next.
        for request in rare:
            if request.ended_s is None and request.is_complete:
                self._ended(request, now_s)
        return billed_joules, billed_s

    def _take_plain(self, news: StepNews, touched: dict[LiveRequest, None]) -> tuple[float, float]:
        """The rows that make up nearly all of an answer: this loop is the cost of a token here."""
        seconds = news.token_s
        joules, grams = self._biller.price(seconds)
        sequences, count = self._sequences, 0
        for handle, index, token_id in news.rows():
            found = sequences.get(handle)
            if found is None:
                continue
            request, choice = found
            request.engine_s += seconds
            request.joules += joules
            request.grams_co2e += grams
            count += 1
            token_ids = choice.token_ids
            if choice.finished is None and index == choice.first_index + len(token_ids):
                token_ids.append(token_id)
                touched[request] = None
        return count * joules, count * seconds

    def fail(self, request: LiveRequest, *, code: str, message: str) -> None:
        """End a request that the engine does not take; no effect where it ended or was overtaken."""
        if not self.holds(request) or request.ended_s is not None:
            return
        self._cancel(request.variant, request.handles)
        for choice in request.choices:
            if choice.finished is None:
                choice.finished = Finished(
                    reason=inference.FINISH_REASON_ERROR, error_code=code, error_message=message
                )
        self._ended(request, time.time())
        self.outbox(request.gateway_id).mark(request)

    def stop(self, request_id: str, choice: int | None) -> bool:
        """Stop computing a request or one choice; False (and remembered) where it is not here."""
        request = self._live.get(request_id)
        if request is None:
            if choice is None:
                self._tombstones[request_id] = time.monotonic()
            return False
        numbers = range(len(request.choices)) if choice is None else [choice]
        going = [n for n in numbers if n < len(request.choices) and request.choices[n].finished is None]
        if going:
            for number in going:
                request.choices[number].finished = Finished(reason=inference.FINISH_REASON_CANCELLED)
            self._cancel(request.variant, tuple(request.choices[number].handle for number in going))
            if request.is_complete:
                self._ended(request, time.time())
            self.outbox(request.gateway_id).mark(request)
        return True

    def attach(self, request_id: str, gateway_id: str) -> bool:
        """Send the request's output to this gateway from now on; False where it is not here."""
        request = self._live.get(request_id)
        if request is None:
            return False
        if request.gateway_id != gateway_id:
            self.outbox(request.gateway_id).forget(request)
            request.gateway_id = gateway_id
        request.last_wanted_s = time.monotonic()
        request.rewind()
        self.outbox(gateway_id).mark(request)
        return True

    def connected(self, gateway_id: str) -> None:
        """A gateway's stream is new: all that it holds must be sent again."""
        box = self.outbox(gateway_id)
        for request in self._live.values():
            if request.gateway_id == gateway_id:
                request.rewind()
                box.mark(request)

    def confirm_complete(self, request_id: str) -> None:
        """The gateway has all of it: acknowledge the assignment and forget it."""
        request = self._live.get(request_id)
        if request is not None and request.ended_s is not None:
            self._drop(request)
            self._acknowledge(request)

    def sweep(self, *, orphan_s: float) -> None:
        """Let go of what no gateway has asked for in `orphan_s`, of old tombstones and outboxes."""
        now_s = time.monotonic()
        for request in list(self._live.values()):
            if self.outbox(request.gateway_id).is_connected and request.ended_s is None:
                request.last_wanted_s = now_s
            elif now_s - max(request.last_wanted_s, request.ended_s or 0.0) > orphan_s:
                log.info("orphan_dropped", extra={"request_id": request.request_id})
                self.stop(request.request_id, None)
                self._drop(request)
                self._acknowledge(request)
        self._tombstones = {k: t for k, t in self._tombstones.items() if now_s - t < TOMBSTONE_S}
        wanted = {request.gateway_id for request in self._live.values()}
        for gateway_id, box in list(self._outboxes.items()):
            if not box.is_connected and gateway_id not in wanted:
                del self._outboxes[gateway_id]

    async def settle(self) -> None:
        """Wait for acknowledgements under way; what Redis does not take in time, others take over."""
        if self._endings:
            await asyncio.wait(self._endings, timeout=SETTLING_S)

    def _take(self, request: LiveRequest, choice: Choice, output: Output, now_s: float) -> None:
        if output.cached_tokens is not None:
            # A reassigned request may find part of its own answer too; only its prompt counts.
            prompt_tokens = len(request.assignment.request.prompt_token_ids)
            found_tokens = min(output.cached_tokens, prompt_tokens)
            request.cached_prompt_tokens = max(request.cached_prompt_tokens, found_tokens)
        if output.dropped_tokens is not None:
            choice.dropped_tokens = output.dropped_tokens
        if choice.finished is not None:
            return  # stopped meanwhile
        if output.prompt_logprobs is not None:
            following = request.assignment.request.prompt_token_ids[1:]
            choice.prompt_logprobs = [
                _logprobs(token_id, *row)
                for token_id, row in zip(following, output.prompt_logprobs, strict=True)
            ]
        if output.token_id is not None and output.place == choice.first_index + len(choice.token_ids):
            choice.token_ids.append(output.token_id)
            if output.logprob is not None:
                choice.logprobs.append(_logprobs(output.token_id, output.logprob, output.top_logprobs))
            if not request.first_token_unix_s:
                request.first_token_unix_s = now_s
        if output.finish_reason is not None:
            choice.finished = Finished(
                reason=_REASONS[output.finish_reason],
                error_code=output.error_code,
                error_message=output.error_message,
            )

    def _ended(self, request: LiveRequest, now_s: float) -> None:
        request.ended_s = time.monotonic()
        request.ended_unix_s = now_s
        put_spans(self._spans, request, self._worker_id)
        if self.on_ended is not None:
            self.on_ended(request)
        admitted = request.assignment.request
        finished = RequestFinished(
            request_id=request.request_id,
            tenant=admitted.tenant,
            model=admitted.model,
            variant=request.variant,
            worker_id=self._worker_id,
            reason=_last_reason(request),
            usage=request.usage(),
            attempt=admitted.attempt,
            admitted_unix_s=admitted.admitted_unix_s,
            started_unix_s=request.started_unix_s,
            first_token_unix_s=request.first_token_unix_s,
            finished_unix_s=now_s,
        )
        event = Event(
            id=uuid.uuid4().hex, at_unix_s=now_s, traceparent=admitted.traceparent, finished=finished
        )
        self._in_background(persistently(lambda: self._events.publish(event), what="publish finished"))

    def _acknowledge(self, request: LiveRequest) -> None:
        failed = any(c.finished and c.finished.error_code for c in request.choices)
        state = State.FAILED if failed else State.FINISHED

        async def end() -> None:
            await persistently(
                lambda: self._records.end(
                    request.entry_id, request.assignment, state, tokens=request.work_tokens
                ),
                what="acknowledge assignment",
            )
            self._entries.discard(request.entry_id)

        self._in_background(end())

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._ending_done)

    def _ending_done(self, task: asyncio.Task[None]) -> None:
        self._endings.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("ending_failed", exc_info=task.exception())

    def _drop(self, request: LiveRequest) -> None:
        self._live.pop(request.request_id, None)
        for handle in request.handles:
            self._sequences.pop(handle, None)
        self.outbox(request.gateway_id).forget(request)


def new_choices(delivered: Iterable[inference.TokenIds], count: int) -> list[Choice]:
    """Choices that continue after what was delivered in earlier attempts."""
    lengths = [len(tokens.ids) for tokens in delivered]
    lengths += [0] * (count - len(lengths))
    return [Choice(first_index=length) for length in lengths[:count]]


def _by_gateway(requests: Iterable[LiveRequest]) -> dict[str, list[LiveRequest]]:
    found: dict[str, list[LiveRequest]] = {}
    for request in requests:
        found.setdefault(request.gateway_id, []).append(request)
    return found


def _take_ending(request: LiveRequest, choice: Choice, ending: Ending) -> None:
    request.scores, request.embedding = ending.scores, ending.embedding
    request.cached_prompt_tokens = ending.cached_tokens
    choice.finished = Finished(reason=inference.FINISH_REASON_STOP)


def _last_reason(request: LiveRequest) -> inference.FinishReason.ValueType:
    """One reason for all choices: the worst of them."""
    reasons = [choice.finished.reason for choice in request.choices if choice.finished is not None]
    return max(reasons, default=inference.FINISH_REASON_UNSPECIFIED)


def _logprobs(token_id: int, logprob: float, top: Iterable[tuple[int, float]]) -> inference.PositionLogprobs:
    return inference.PositionLogprobs(
        chosen=inference.TokenLogprob(token_id=token_id, logprob=logprob),
        top=[inference.TokenLogprob(token_id=other, logprob=value) for other, value in top],
    )
