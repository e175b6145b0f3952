"""From a call's arrival to its end: one timeline, kept here, and one trace where tracing is on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from trireme.errors import Kind, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.live_request import LiveRequest
from trireme.gateway.submission import Submission
from trireme.gateway.timelines import Event, Timeline, Timelines, cut_phases
from trireme.runtime.spans import Attribute, Moment, SpanRef, Spans, span_ref
from trireme.wire.bus.v1.facts_pb2 import RequestKind
from trireme.wire.inference.v1.inference_pb2 import FinishReason
from trireme.wire.worker.v1.worker_pb2 import EngineTimes

PROVIDER = "trireme"
_FAULTS = frozenset({Kind.UNAVAILABLE, Kind.DEADLINE, Kind.ABORTED})
_NO_TIMES = EngineTimes()


@dataclass(slots=True)
class CallTrace:
    """A call whose answer is under way."""

    submission: Submission
    span: SpanRef | None
    parent: SpanRef | None
    events: list[Event] = field(default_factory=list)

    @property
    def traceparent(self) -> str:
        """What the request's facts carry: its own span, or what the client sent."""
        return self.span.traceparent if self.span is not None else self.submission.caller.traceparent


class RequestTraces:
    """Makes the timelines, keeps them, and has them exported."""

    def __init__(self, spans: Spans, *, keep: int) -> None:
        self.timelines = Timelines(keep)
        self._spans = spans

    def begin(self, submission: Submission) -> CallTrace:
        """A checked request is about to be submitted."""
        parent = span_ref(submission.caller.traceparent)
        return CallTrace(submission, self._spans.begin(_name(submission), parent), parent)

    def refused(self, call: CallTrace, error: TriremeError) -> None:
        """It was not admitted."""
        self._finish(call, None, 0.0, error.code, error)

    def ended(self, call: CallTrace, answer: Answer) -> None:
        """Its client has the answer, or is gone."""
        live = answer.live
        outcome = "ok" if answer.delivered else live.error.code if live.error is not None else "cancelled"
        error = None if answer.delivered else live.error
        self._finish(call, live, answer.first_delivery_unix_s, outcome, error)

    def _finish(
        self,
        call: CallTrace,
        live: LiveRequest | None,
        first_delivery_unix_s: float,
        outcome: str,
        error: TriremeError | None,
    ) -> None:
        timeline = _timeline(call, live, first_delivery_unix_s, outcome)
        self.timelines.add(timeline)
        if call.span is not None and call.span.sampled:
            self._export(call, call.span, timeline, live, first_delivery_unix_s, error)

    def _export(
        self,
        call: CallTrace,
        span: SpanRef,
        timeline: Timeline,
        live: LiveRequest | None,
        first_delivery_unix_s: float,
        error: TriremeError | None,
    ) -> None:
        attributes = _asked(call.submission) | _answered(timeline, live)
        if first_delivery_unix_s:
            attributes["gen_ai.response.time_to_first_chunk"] = first_delivery_unix_s - timeline.start_unix_s
        if error is not None:
            attributes["error.type"] = error.code
        moments = [
            Moment(event.name, event.at_unix_s, {"trireme.detail": event.detail} if event.detail else {})
            for event in timeline.events
        ]
        self._spans.put(
            _name(call.submission),
            span,
            parent=call.parent,
            start_unix_s=timeline.start_unix_s,
            end_unix_s=timeline.end_unix_s,
            attributes=attributes,
            moments=moments,
            is_server=True,
            # What the client can mend is no fault of the server's.
            error=error.code if error is not None and error.kind in _FAULTS else "",
        )
        for phase in timeline.phases:
            self._spans.put(
                f"trireme.{phase.name}",
                span.phase(phase.name),
                parent=span,
                start_unix_s=phase.start_unix_s,
                end_unix_s=phase.end_unix_s,
                attributes={"trireme.request_id": timeline.request_id},
            )


def _name(submission: Submission) -> str:
    return f"{_operation(submission)} {submission.model.name}"


def _operation(submission: Submission) -> str:
    if submission.kind == RequestKind.REQUEST_KIND_EMBED:
        return "embeddings"
    return submission.caller.operation


def _timeline(
    call: CallTrace, live: LiveRequest | None, first_delivery_unix_s: float, outcome: str
) -> Timeline:
    submission, end_unix_s = call.submission, time.time()
    start_unix_s = submission.caller.received_unix_s
    times = live.times if live is not None else _NO_TIMES
    usage = live.usage if live is not None else None
    events = list(call.events)
    if first_delivery_unix_s:
        events.append(Event("first_delivery", first_delivery_unix_s))
    if live is not None:
        since_boot_s = end_unix_s - time.monotonic()
        events += [Event(name, since_boot_s + at_s, detail) for at_s, name, detail in live.events]
    parent = span_ref(call.traceparent)
    return Timeline(
        request_id=submission.caller.request_id,
        trace_id=f"{parent.trace_id:032x}" if parent is not None else "",
        operation=_operation(submission),
        tenant=submission.caller.tenant,
        model=submission.model.name,
        variant=live.variant if live is not None else "",
        worker_id=live.worker_id if live is not None else "",
        decision=live.decision if live is not None else "",
        outcome=outcome,
        start_unix_s=start_unix_s,
        end_unix_s=max(start_unix_s, end_unix_s),
        phases=cut_phases(
            start_unix_s,
            (
                live.admitted.admitted_unix_s if live is not None else 0.0,
                times.assigned_unix_s,
                times.started_unix_s or (live.started_unix_s if live is not None else 0.0),
                times.first_token_unix_s,
                times.ended_unix_s,
            ),
            end_unix_s,
        ),
        events=tuple(sorted(events, key=lambda event: event.at_unix_s)),
        attempts=live.attempt if live is not None else 0,
        preemptions=times.preemptions,
        prompt_tokens=len(submission.prompt_token_ids),
        cached_prompt_tokens=usage.cached_prompt_tokens if usage is not None else 0,
        completion_tokens=sum(live.received()) if live is not None else 0,
        kv_load_s=times.kv_load_s,
        kv_loaded_blocks=times.kv_loaded_blocks,
        joules=usage.joules if usage is not None else 0.0,
        grams_co2e=usage.grams_co2e if usage is not None else 0.0,
    )


def _asked(submission: Submission) -> dict[str, Attribute]:
    """Of OpenTelemetry's names for generative AI, those that say what was asked; no text."""
    sampling = submission.sampling
    asked: dict[str, Attribute] = {
        "gen_ai.operation.name": _operation(submission),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": submission.model.name,
        "trireme.tenant": submission.caller.tenant,
    }
    if submission.kind == RequestKind.REQUEST_KIND_GENERATE:
        asked |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.choice.count": sampling.n,
        }
    if sampling.top_k:
        asked["gen_ai.request.top_k"] = sampling.top_k
    return asked


def _answered(timeline: Timeline, live: LiveRequest | None) -> dict[str, Attribute]:
    """What came of it."""
    seconds: dict[str, float] = {phase.name: phase.seconds for phase in timeline.phases}
    answered: dict[str, Attribute] = {
        "gen_ai.response.id": timeline.request_id,
        "gen_ai.usage.input_tokens": timeline.prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.cached_prompt_tokens,
        "gen_ai.latency.e2e": timeline.seconds,
        "trireme.request_id": timeline.request_id,
        "trireme.outcome": timeline.outcome,
    }
    if live is None:
        return answered
    answered |= _latencies(seconds)
    answered |= {
        "gen_ai.response.model": timeline.variant,
        "trireme.worker_id": timeline.worker_id,
        "trireme.decision": timeline.decision,
        "trireme.attempts": timeline.attempts,
        "trireme.preemptions": timeline.preemptions,
        "trireme.kv_loaded_blocks": timeline.kv_loaded_blocks,
        "trireme.energy_joules": timeline.joules,
        "trireme.carbon_grams_co2e": timeline.grams_co2e,
    }
    reasons = [
        FinishReason.Name(choice.reason).removeprefix("FINISH_REASON_").lower()
        for choice in live.choices
        if choice.reason
    ]
    if reasons:
        answered["gen_ai.response.finish_reasons"] = reasons
    return answered


def _latencies(seconds: Mapping[str, float]) -> dict[str, Attribute]:
    """By the keys that vLLM and SGLang use, since the conventions have none for phases."""
    queue_s = seconds.get("queue", 0.0) + seconds.get("engine_queue", 0.0)
    prefill_s, decode_s = seconds.get("prefill", 0.0), seconds.get("decode", 0.0)
    return {
        "gen_ai.latency.time_in_queue": queue_s,
        "gen_ai.latency.time_in_model_prefill": prefill_s,
        "gen_ai.latency.time_in_model_decode": decode_s,
        "gen_ai.latency.time_in_model_inference": prefill_s + decode_s,
        "gen_ai.latency.time_to_first_token": seconds.get("receive", 0.0) + queue_s + prefill_s,
    }
