"""What arrives: the record that traces and generators make and that the fleet consumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trireme.errors import InvalidConfiguration

TICK_S = 2.0**-30
"""All simulated times are whole multiples of this (0.93 ns). Sums of such float64 numbers are exact up to
2**23 s (97 days), so charging an interval at once or in steps gives the same number, bit for bit."""


def on_tick(seconds: float) -> float:
    """The nearest whole multiple of `TICK_S`."""
    return round(seconds / TICK_S) * TICK_S


class Request(NamedTuple):
    """One request. A tuple: a million of them are made at once."""

    request_id: str
    arrival_s: float
    """Seconds after the start; for a later turn of a closed session, the earliest it may come."""
    prompt_tokens: int
    answer_tokens: int
    """At least 1. Policies do not see it, the oracle aside."""
    session_id: str = ""
    after: str = ""
    """The request whose answer this one waits for; it comes `think_s` after that ended."""
    think_s: float = 0.0
    block_runs: tuple[tuple[int, int], ...] = ()
    """Ids of the prompt's prefix blocks as (first id, count): (5, 3) is 5, 6, 7. Equal leading ids are an
    equal prefix."""
    block_tokens: int = 0
    """Tokens per prefix block; 0 where the trace names none."""

    def block_ids(self) -> Iterator[int]:
        """The prefix blocks' ids, in order."""
        for first, count in self.block_runs:
            yield from range(first, first + count)


def rescaled(
    requests: Sequence[Request],
    *,
    rate_rps: float | None = None,
    prompt_factor: float = 1.0,
    answer_factor: float = 1.0,
) -> list[Request]:
    """The same requests at another mean rate or of other lengths.

    Args:
        rate_rps: stretch time evenly so that the mean arrival rate becomes this; bursts keep their shape.
        prompt_factor, answer_factor: factors on token counts, so that a small model can play a large
            one's trace. A block keeps its ids and stands for proportionally many tokens.

    Raises:
        InvalidConfiguration: a factor or the rate is not positive, or there is one request at most and
            so no rate.
    """
    for name, value in (("rate", rate_rps), ("prompt", prompt_factor), ("answer", answer_factor)):
        if value is not None and not 0 < value < math.inf:
            raise InvalidConfiguration(f"the {name} factor is {value}; it must be positive", param=name)
    stretch = 1.0
    if rate_rps is not None:
        span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
        if span_s <= 0:
            raise InvalidConfiguration(
                "requests that all arrive at once have no rate to change", param="rate"
            )
        stretch = (len(requests) - 1) / span_s / rate_rps
    return [
        request._replace(
            arrival_s=on_tick(request.arrival_s * stretch),
            prompt_tokens=max(1, round(request.prompt_tokens * prompt_factor)),
            answer_tokens=max(1, round(request.answer_tokens * answer_factor)),
            block_tokens=max(1, round(request.block_tokens * prompt_factor)) if request.block_tokens else 0,
        )
        for request in requests
    ]


def checked(requests: Sequence[Request]) -> list[Request]:
    """The requests in order of arrival.

    Raises:
        InvalidConfiguration: there is none, an id comes twice, a length is below 1, a time is negative
            or not a number, or a request waits for one that does not exist.
    """
    if not requests:
        raise InvalidConfiguration("there is no request to simulate", param="trace")
    ids = {request.request_id for request in requests}
    if len(ids) < len(requests):
        raise InvalidConfiguration("two requests have the same id", param="trace")
    for request in requests:
        if request.prompt_tokens < 1 or request.answer_tokens < 1:
            raise InvalidConfiguration(
                f"request {request.request_id} has {request.prompt_tokens} prompt and "
                f"{request.answer_tokens} answer tokens; both must be at least 1",
                param="trace",
            )
        if not 0 <= request.arrival_s < math.inf or not 0 <= request.think_s < math.inf:
            raise InvalidConfiguration(
                f"request {request.request_id} arrives at {request.arrival_s} s after thinking "
                f"{request.think_s} s; both must be finite and not negative",
                param="trace",
            )
        if request.after and request.after not in ids:
            raise InvalidConfiguration(
                f"request {request.request_id} waits for {request.after}, which is not in the trace",
                param="trace",
            )
    return sorted(requests, key=lambda request: request.arrival_s)
