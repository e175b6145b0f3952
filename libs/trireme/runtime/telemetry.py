"""Structured logs, and traces where an OTLP endpoint is configured.

A log line is an event with fields: `log.info("caps_applied", extra={"total_w": 700})`.
Prompt and answer texts are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PROPAGATOR = TraceContextTextMapPropagator()


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, service, event, then the fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage(),
        }
        line.update({key: value for key, value in vars(record).items() if key not in _PLAIN})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(service: str, *, level: str = "info") -> None:
    """Send JSON lines of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.getLogger("aiohttp.access").setLevel("WARNING")


def configure_tracing(service: str) -> None:
    """Export spans by OTLP if OTEL_EXPORTER_OTLP_ENDPOINT is set; else record none."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"trireme-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, *, traceparent: str = "", kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A span below the W3C `traceparent`; a no-op where tracing is off."""
    parent = _PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else None
    with trace.get_tracer("trireme").start_as_current_span(name, context=parent, kind=kind) as current:
        yield current


def current_traceparent() -> str:
    """The W3C trace context of the current span, or an empty string."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")
