"""Where the time of a request went: phases without a gap, from its call's arrival to its end.

Pure: times come in, seconds since 1970, from the clocks of gateway, scheduler and worker. Where these differ
the phases are cut so that they still sum to the time between arrival and end, which one clock measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

PHASES = ("receive", "queue", "engine_queue", "prefill", "decode", "deliver")
"""In order. receive: until the request is on its way to the bus: read, checked, tokenised. queue: until a
worker is chosen. engine_queue: until the engine runs it. prefill: until its first token is made. decode:
until its last. deliver: until its client has all of it."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a request's time."""

    name: str
    start_unix_s: float
    end_unix_s: float

    @property
    def seconds(self) -> float:
        return self.end_unix_s - self.start_unix_s


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on the way."""

    name: str
    """durable, first_delivery, paused, resumed, attempt."""
    at_unix_s: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One request as this gateway saw it, once it had ended. No text of prompt or answer."""

    request_id: str
    trace_id: str
    """32 hexadecimal digits; empty where the call brought none and tracing is off."""
    operation: str
    """chat, text_completion or embeddings, as OpenTelemetry names them."""
    tenant: str
    model: str
    variant: str
    worker_id: str
    decision: str
    """The scheduler's reason."""
    outcome: str
    """ok, cancelled, or the error's code."""
    start_unix_s: float
    end_unix_s: float
    phases: tuple[Phase, ...]
    """They meet, and sum to the whole."""
    events: tuple[Event, ...]
    attempts: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    kv_load_s: float
    kv_loaded_blocks: int
    joules: float
    grams_co2e: float

    @property
    def seconds(self) -> float:
        return self.end_unix_s - self.start_unix_s


class Timelines:
    """The last requests of a gateway, as many as `keep`."""

    def __init__(self, keep: int) -> None:
        self._kept: deque[Timeline] = deque(maxlen=keep)

    def add(self, timeline: Timeline) -> None:
        """Keep it, at the cost of the oldest."""
        self._kept.append(timeline)

    def latest(self, count: int) -> list[Timeline]:
        """So many of them, newest first."""
        return [timeline for timeline, _ in zip(reversed(self._kept), range(count), strict=False)]

    def find(self, request_id: str) -> Timeline | None:
        """The newest of that request."""
        return next((kept for kept in reversed(self._kept) if kept.request_id == request_id), None)


def cut_phases(start_unix_s: float, ends_unix_s: Sequence[float], end_unix_s: float) -> tuple[Phase, ...]:
    """The phases between start and end, in the order of PHASES.

    Args:
        ends_unix_s: when each phase but the last ended; 0: not known, or not reached. Such a phase goes on
            until the next end that is known, and those between are left out.
    """
    end_unix_s = max(start_unix_s, end_unix_s)
    phases = []
    begun_unix_s, name = start_unix_s, ""
    for own_name, ended_unix_s in zip(PHASES, (*ends_unix_s, end_unix_s), strict=True):
        name = name or own_name
        if not ended_unix_s:
            continue
        until_unix_s = min(max(begun_unix_s, ended_unix_s), end_unix_s)
        if until_unix_s > begun_unix_s:
            phases.append(Phase(name, begun_unix_s, until_unix_s))
        begun_unix_s, name = until_unix_s, ""
    return tuple(phases)
