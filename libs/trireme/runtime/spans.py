"""Spans of requests, made whole once they have ended.

A request's trace begins at its gateway, which cuts the request's time into phases. The ids of the phases'
spans follow from the id of the request's own span, which travels with every fact of the request: so each
process hangs what it did below the phase it did it in, and asks nobody.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either turns tracing on."""
Attribute = str | int | float | bool | Sequence[str]
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class SpanRef:
    """A span, as others refer to it."""

    trace_id: int
    span_id: int
    sampled: bool

    @property
    def traceparent(self) -> str:
        """As W3C writes it."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"

    def phase(self, name: str) -> SpanRef:
        """The span of this request's phase of that name: the same for whoever asks."""
        digest = hashlib.blake2b(f"{self.span_id:016x}/{name}".encode(), digest_size=8).digest()
        return SpanRef(self.trace_id, int.from_bytes(digest, "big") or 1, self.sampled)


def span_ref(traceparent: str) -> SpanRef | None:
    """What a W3C `traceparent` refers to; None where it is malformed or refers to nothing."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return SpanRef(trace_id, span_id, bool(flags & 1)) if trace_id and span_id else None


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened during a span."""

    name: str
    at_unix_s: float
    attributes: Mapping[str, Attribute]


class Spans(Protocol):
    """Where a process's spans go."""

    def begin(self, name: str, parent: SpanRef | None) -> SpanRef | None:
        """A new request's span below `parent`, or of a trace of its own; None where tracing is off."""
        ...

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
        """Record a span that has ended; `span` None draws an id. Nothing where it is not sampled."""
        ...


class NoSpans:
    """Tracing is off."""

    def begin(self, name: str, parent: SpanRef | None) -> SpanRef | None:
        return None

    def put(self, name: str, span: SpanRef | None, **_: object) -> None:
        return None


def spans_to_collector(service: str) -> Spans:
    """Spans to where the OTEL_* variables say; none where they name no endpoint, or turn tracing off."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    if off or not any(os.environ.get(variable) for variable in ENDPOINTS):
        return NoSpans()
    # A tenth of a second to import, which only those pay who trace.
    from trireme.runtime.span_export import exporting

    return exporting(service)
