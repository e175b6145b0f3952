"""What every gRPC call brings and leaves: its caller, its count, a client that stops reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import grpc

from trireme.errors import InvalidRequest, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.arrivals import note_arrival
from trireme.gateway.identity import current_principal
from trireme.gateway.metrics import Metrics
from trireme.gateway.submission import (
    Caller,
    checked_name,
    checked_request_id,
    checked_traceparent,
)
from trireme.runtime.serving import Context
from trireme.wire.inference.v1.inference_pb2 import SloClass

MAX_DEADLINE_S = 7 * 24 * 3600.0
"""A gRPC deadline beyond this is none."""


def caller_of(
    context: Context,
    *,
    request_id: str = "",
    slo_class: SloClass.ValueType = SloClass.SLO_CLASS_UNSPECIFIED,
    priority: int = 0,
    session_id: str = "",
) -> Caller:
    """Who asks, by the call's metadata and deadline, and how, by what its message says.

    Raises:
        InvalidRequest: a name has other characters than names may have, or the class is unknown.
    """
    metadata = metadata_of(context)
    if slo_class not in SloClass.values():
        raise InvalidRequest(f"slo_class {slo_class} is not known", param="slo_class")
    remaining_s = context.time_remaining()
    limited = remaining_s is not None and remaining_s < MAX_DEADLINE_S
    return Caller(
        request_id=checked_request_id(request_id),
        tenant=current_principal().tenant,
        slo_class=slo_class,
        priority=priority,
        session_id=checked_name(session_id, param="session_id"),
        deadline_unix_s=time.time() + (remaining_s or 0.0) if limited else 0.0,
        traceparent=checked_traceparent(metadata.get("traceparent", "")),
    )


def metadata_of(context: Context) -> Mapping[str, str]:
    """The call's metadata that is text."""
    pairs = context.invocation_metadata() or ()
    return {str(key): value for key, value in pairs if isinstance(value, str)}


@contextmanager
def counted(metrics: Metrics, call: str) -> Iterator[None]:
    """Count a call by how it ends."""
    note_arrival()
    code = "cancelled"  # What leaves neither by return nor by error was cut off.
    try:
        yield
        code = "ok"
    except TriremeError as error:
        code = error.code
        raise
    except Exception:
        code = "internal"
        raise
    finally:
        metrics.requests.labels(f"grpc_{call}", code).inc()


class ClientWatch:
    """Ends the answers of clients that take nothing for `stall_s`."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._endings: set[asyncio.Task[None]] = set()

    @contextmanager
    def taking(self, context: Context, *answers: Answer) -> Iterator[None]:
        """The block hands something to the client."""
        timer = asyncio.get_running_loop().call_later(self._stall_s, self._give_up, context, answers)
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, context: Context, answers: tuple[Answer, ...]) -> None:
        # Its requests end now, its call once it reads on or goes away.
        for answer in answers:
            answer.close()
        ending = asyncio.create_task(_end(context))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


async def _end(context: Context) -> None:
    with suppress(grpc.aio.AbortError):
        await context.abort(grpc.StatusCode.CANCELLED, "the answer was not read for too long")
