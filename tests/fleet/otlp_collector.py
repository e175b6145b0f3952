"""An OTLP collector that keeps what it gets: the real TraceService over gRPC, in the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc


@dataclass(frozen=True)
class Received:
    """One span, with its process's service name."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    raw: bytes

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


class Collector(rpc.TraceServiceServicer):  # type: ignore[misc]
    """What came so far."""

    def __init__(self) -> None:
        self._spans: list[Received] = []
        self._news = threading.Condition()
        self.address = ""

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        with self._news:
            for of_process in request.resource_spans:
                service = _attributes(of_process.resource.attributes)["service.name"]
                for scope in of_process.scope_spans:
                    self._spans += [_received(service, span) for span in scope.spans]
            self._news.notify_all()
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str, *names: str, within_s: float = 60.0) -> list[Received]:
        """The spans of a trace, once there is one of each of these names."""
        deadline_s = time.monotonic() + within_s
        with self._news:
            while True:
                found = [span for span in self._spans if span.trace_id == trace_id]
                missing = set(names) - {span.name for span in found}
                if not missing:
                    return found
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"no {sorted(missing)} among {[span.name for span in found]}"
                self._news.wait(left_s)

    def spans(self) -> list[Received]:
        """All that came so far."""
        with self._news:
            return list(self._spans)

    def traces(self) -> set[str]:
        """Ids of all traces."""
        with self._news:
            return {span.trace_id for span in self._spans}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port until the block ends."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    rpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)


def _received(service: str, span: Any) -> Received:
    return Received(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(event.name for event in span.events),
        raw=span.SerializeToString(),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)
