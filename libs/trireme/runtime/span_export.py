"""Spans on their way to an OTLP collector, by OpenTelemetry's own exporter.

They wait in a bounded queue that another thread empties. A collector that is slow or away costs spans, never
a request.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from trireme.runtime.spans import Attribute, Moment, SpanRef

FLUSH_S = 2.0
"""How long a process that ends waits for the collector."""


def exporting(service: str) -> ExportedSpans:
    """Spans of this process to the collector that the environment names."""
    processor = BatchSpanProcessor(OTLPSpanExporter())
    atexit.register(_end_within, processor.shutdown, FLUSH_S)
    return ExportedSpans(service, processor)


class SpanSink(Protocol):
    """An OpenTelemetry span processor, as far as it is needed here."""

    def on_end(self, span: ReadableSpan) -> None: ...


class ExportedSpans:
    """Hands sampled spans to a span processor."""

    def __init__(self, service: str, sink: SpanSink) -> None:
        own = {"service.namespace": "trireme", "service.instance.id": f"{service}-{os.getpid()}"}
        resource = Resource.create(own)
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": f"trireme-{service}"}))
        self._resource = resource
        self._scope = InstrumentationScope("trireme")
        # It reads which sampler the environment wants.
        self._sampler = TracerProvider(resource=resource, shutdown_on_exit=False).sampler
        self._sink = sink

    def begin(self, name: str, parent: SpanRef | None) -> SpanRef | None:
        trace_id = parent.trace_id if parent is not None else secrets.randbits(128) or 1
        context = None
        if parent is not None:
            context = trace.set_span_in_context(trace.NonRecordingSpan(_context(parent, remote=True)))
        decided = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER)
        return SpanRef(trace_id, secrets.randbits(64) or 1, decided.decision is Decision.RECORD_AND_SAMPLE)

    def put(
        self,
        name: str,
        span: SpanRef | None,
        *,
        parent: SpanRef | None,
        start_unix_s: float,
        end_unix_s: float,
        attributes: Mapping[str, Attribute],
        moments: Sequence[Moment] = (),
        is_server: bool = False,
        error: str = "",
    ) -> None:
        if span is None and parent is not None:
            span = SpanRef(parent.trace_id, secrets.randbits(64) or 1, parent.sampled)
        if span is None or not span.sampled:
            return
        start_ns = round(start_unix_s * 1e9)
        made = ReadableSpan(
            name,
            context=_context(span, remote=False),
            parent=_context(parent, remote=is_server) if parent is not None else None,
            resource=self._resource,
            attributes=attributes,
            events=[
                Event(moment.name, moment.attributes, round(moment.at_unix_s * 1e9)) for moment in moments
            ],
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
            start_time=start_ns,
            end_time=max(start_ns, round(end_unix_s * 1e9)),
            instrumentation_scope=self._scope,
        )
        self._sink.on_end(made)


def _context(span: SpanRef, *, remote: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if span.sampled else TraceFlags.DEFAULT)
    return SpanContext(span.trace_id, span.span_id, is_remote=remote, trace_flags=flags)


def _end_within(shutdown: Callable[[], None], seconds: float) -> None:
    # Where the collector is away, its client tries for as long as a pod has to end.
    ending = threading.Thread(target=shutdown, daemon=True)
    ending.start()
    ending.join(seconds)
