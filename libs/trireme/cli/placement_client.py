"""Calls to the placement service of a running fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc

from trireme.errors import ServiceUnavailable
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb
from trireme.wire.placement.v1.placement_pb2_grpc import PlacementStub

if TYPE_CHECKING:
    from trireme.wire.placement.v1.placement_pb2_grpc import PlacementAsyncStub

CALL_TIMEOUT_S = 5.0


def placement_address(records: Sequence[ProcessRecord]) -> str:
    """host:port of the living placement service; empty where none lives."""
    return next((record.grpc_address for record in records if record.service == "placement"), "")


@asynccontextmanager
async def placement(records: Sequence[ProcessRecord]) -> AsyncIterator[PlacementAsyncStub]:
    """A stub for the placement service among the living processes.

    Raises:
        ServiceUnavailable: none lives.
    """
    address = placement_address(records)
    if not address:
        raise ServiceUnavailable("the placement service is away: see `trireme status`, then try again")
    async with open_channel(address) as channel:
        yield PlacementStub(channel)


async def placement_state(records: Sequence[ProcessRecord]) -> pb.GetStateResponse | None:
    """The desired and the living workers; None where placement does not answer."""
    try:
        async with placement(records) as stub:
            return await stub.GetState(pb.GetStateRequest(), timeout=CALL_TIMEOUT_S)
    except (ServiceUnavailable, grpc.aio.AioRpcError):
        return None


async def crash_looping_workers(records: Sequence[ProcessRecord], *, deaths: int) -> list[tuple[str, str]]:
    """Name and last exit of the workers that died at least `deaths` times and are crash-looping."""
    state = await placement_state(records)
    return [
        (f"{worker.group}-{worker.index}", worker.last_exit)
        for worker in (state.workers if state is not None else ())
        if worker.crash_looping and worker.restarts >= deaths
    ]
