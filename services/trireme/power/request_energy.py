"""The energy of the newest finished requests, from `events`."""

from __future__ import annotations

from collections import OrderedDict

from trireme.bus.streams import Stream
from trireme.errors import RequestNotFound
from trireme.wire.bus.v1.facts_pb2 import Event, RequestFinished


class FinishedRequests:
    """A bounded map of finished requests; refilled from the stream at start."""

    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._finished: OrderedDict[str, RequestFinished] = OrderedDict()

    def take(self, finished: RequestFinished) -> None:
        """Keep one; the same request again replaces what was kept."""
        self._finished[finished.request_id] = finished
        self._finished.move_to_end(finished.request_id)
        while len(self._finished) > self._capacity:
            self._finished.popitem(last=False)

    def get(self, request_id: str) -> RequestFinished:
        """One finished request.

        Raises:
            RequestNotFound: it has not finished, or newer ones have pushed it out.
        """
        finished = self._finished.get(request_id)
        if finished is None:
            raise RequestNotFound(
                f"request {request_id!r} is not among the newest {self._capacity} that have finished",
                param="request_id",
            )
        return finished

    async def follow(self, events: Stream[Event]) -> None:
        """Take each finished request in, from the stream's beginning, for ever."""
        async for entry in events.tail(after="0-0"):
            if entry.fact.HasField("finished"):
                self.take(entry.fact.finished)
