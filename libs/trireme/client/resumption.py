"""What a client must remember to go on with an answer at another gateway. Pure."""

from __future__ import annotations

from trireme.client.events import Accepted, ChoiceFinished, Delta, Event, Summary, event_from
from trireme.errors import Overloaded, RequestFailed, TriremeError
from trireme.wire.inference.v1 import inference_pb2 as pb


class ResumableAnswer:
    """Follows one answer over any number of streams."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        self._received = [0] * max(1, request.sampling.n)
        self._finished: set[int] = set()
        self._accepted = False
        self.done = False
        """True after the Summary."""

    @property
    def request_id(self) -> str:
        return self._request.request_id

    def outlasts(self, error: TriremeError) -> bool:
        """Whether an answer that was accepted should wait for the error to pass."""
        return self._accepted and isinstance(error, Overloaded)

    def next_call(self) -> pb.GenerateRequest:
        """The request that goes on where the answer stopped."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if any(self._received):
            request.resume_from.extend(self._received)
        return request

    def take(self, response: pb.GenerateResponse) -> Event | None:
        """The event to show; None for what was shown before.

        Raises:
            RequestFailed: tokens are missing, which a server of the fleet never lets happen.
        """
        event = event_from(response)
        match event:
            case Accepted():
                # A request that every record of was lost is made again: with its seed, equal.
                self._request.sampling.seed = event.seed
                self._request.request_id = event.request_id
                if self._accepted:
                    return None
                self._accepted = True
            case Delta():
                have = self._received[event.choice]
                if event.first_index > have:
                    raise RequestFailed(
                        f"choice {event.choice}: tokens {have} to {event.first_index - 1} are missing"
                    )
                if event.first_index < have:
                    return None
                self._received[event.choice] = have + len(event.token_ids)
            case ChoiceFinished():
                if event.choice in self._finished:
                    return None
                self._finished.add(event.choice)
            case Summary():
                self.done = True
        return event
