"""Preemptions and level changes of sequences, as a log line each and, for preemptions, an event."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from trireme.bus.connection import AWAY
from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import Event, SequencePreempted
from trireme.worker.live_requests import LiveRequest
from trireme.worker.step_news import Turn

log = logging.getLogger(__name__)

_STOPPED = frozenset({"paused", "swapped_out", "evicted"})


def turn_events(
    worker_id: str, turns: Iterable[Turn], request_of: Callable[[int], LiveRequest | None]
) -> list[Event]:
    """The events of those that stopped; all are logged. Requests that have ended are left out."""
    events = []
    for turn in turns:
        live = request_of(turn.handle)
        if live is None:
            continue
        request_id = live.request_id
        log.debug("sequence_turn", extra={"request_id": request_id, "kind": turn.kind, "reason": turn.reason})
        if turn.kind in _STOPPED:
            live.note_stop(turn.kind, turn.reason)
            what = SequencePreempted(
                request_id=request_id, worker_id=worker_id, reason=f"{turn.kind}: {turn.reason}"
            )
            events.append(Event(id=uuid.uuid4().hex, at_unix_s=time.time(), preempted=what))
    return events


async def publish_turns(events: Stream[Event], stopped: Sequence[Event]) -> None:
    """Publish them; while Redis is away they are lost, as they are samples anyway."""
    try:
        for event in stopped:
            await events.publish(event)
    except AWAY:
        log.debug("turns_unpublished", extra={"events": len(stopped)})
