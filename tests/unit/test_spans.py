"""Spans: W3C's ids, what the environment's sampler wants, and a collector that is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from trireme.runtime.span_export import ExportedSpans
from trireme.runtime.spans import Moment, NoSpans, SpanRef, span_ref, spans_to_collector

IDS = st.integers(min_value=1, max_value=2**64 - 1)


class Sink(list[ReadableSpan]):
    def on_end(self, span: ReadableSpan) -> None:
        self.append(span)


def put(spans: ExportedSpans, span: SpanRef | None, **more: object) -> None:
    wanted = {"parent": None, "start_unix_s": 1.0, "end_unix_s": 3.0, "attributes": {}, **more}
    spans.put("one", span, **wanted)  # type: ignore[arg-type]


@given(trace_id=IDS, span_id=IDS, sampled=st.booleans())
def test_a_traceparent_reads_as_opentelemetry_reads_it(trace_id: int, span_id: int, sampled: bool) -> None:
    written = SpanRef(trace_id, span_id, sampled)
    assert span_ref(written.traceparent) == written
    from opentelemetry import trace

    context = TraceContextTextMapPropagator().extract({"traceparent": written.traceparent})
    theirs = trace.get_current_span(context).get_span_context()
    assert (theirs.trace_id, theirs.span_id, theirs.trace_flags.sampled) == (trace_id, span_id, sampled)


@pytest.mark.parametrize(
    "text", ["", "00-1-2-01", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01"]
)
def test_what_refers_to_nothing_is_no_span(text: str) -> None:
    assert span_ref(text) is None


def test_a_phase_has_the_same_id_for_whoever_asks() -> None:
    root = SpanRef(1, 2, True)
    assert root.phase("queue") == SpanRef(1, 2, True).phase("queue")
    assert len({root.phase("queue"), root.phase("decode"), SpanRef(1, 3, True).phase("queue"), root}) == 4


@pytest.mark.parametrize(
    ("sampler", "without_parent", "below_sampled", "below_unsampled"),
    [
        ("parentbased_always_on", True, True, False),
        ("parentbased_always_off", False, True, False),
        ("always_on", True, True, True),
        ("always_off", False, False, False),
    ],
)
def test_the_environments_sampler_decides(
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    without_parent: bool,
    below_sampled: bool,
    below_unsampled: bool,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    spans = ExportedSpans("gateway", Sink())
    for parent, expected in (
        (None, without_parent),
        (SpanRef(5, 6, True), below_sampled),
        (SpanRef(5, 6, False), below_unsampled),
    ):
        begun = spans.begin("x", parent)
        assert begun is not None and begun.sampled is expected
        assert parent is None or begun.trace_id == parent.trace_id


def test_a_span_is_told_as_it_was() -> None:
    sink = Sink()
    spans = ExportedSpans("gateway", sink)
    root = SpanRef(1, 2, True)
    moments = [Moment("paused", 2.0, {"trireme.detail": "why"})]
    put(spans, root, moments=moments, is_server=True, error="unavailable")
    put(spans, None, parent=root)
    put(spans, SpanRef(1, 9, False))
    server, child = sink
    assert (server.start_time, server.end_time) == (10**9, 3 * 10**9)
    assert server.status.status_code is StatusCode.ERROR
    assert [(event.name, event.timestamp) for event in server.events] == [("paused", 2 * 10**9)]
    assert server.resource.attributes["service.name"] == "trireme-gateway"
    assert child.parent is not None and child.parent.span_id == 2
    assert child.context is not None and child.context.trace_id == 1


def test_the_operators_name_for_a_service_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    sink = Sink()
    put(ExportedSpans("gateway", sink), SpanRef(1, 2, True))
    assert sink[0].resource.attributes["service.name"] == "front"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for variable in list(os.environ):
        if variable.startswith("OTEL_"):
            monkeypatch.delenv(variable)
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert isinstance(spans_to_collector("gateway"), NoSpans)


def test_a_collector_that_never_answers_holds_up_neither_spans_nor_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        program = """
from trireme.runtime.spans import SpanRef, spans_to_collector
spans = spans_to_collector("gateway")
for number in range(1, 20_000):
    root = SpanRef(number, number, True)
    spans.put("one", root, parent=None, start_unix_s=1.0, end_unix_s=2.0, attributes={})
print("put")
"""
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
            },
            capture_output=True,
            text=True,
            timeout=120,  # The exporter alone would wait an hour.
        )
    assert (found.returncode, found.stdout) == (0, "put\n"), found.stderr
