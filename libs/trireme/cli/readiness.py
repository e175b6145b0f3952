"""What of a fleet is there: leases in the registry, health over gRPC, workers that serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.bus.registry import Registry
from trireme.cli.fleet_processes import local_address
from trireme.client.credentials import open_gateway
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

LOOK_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """The registry at one moment."""

    redis_answers: bool
    records: list[ProcessRecord] = field(default_factory=list)
    """All living processes; empty while Redis is away."""

    def of_pid(self, pid: int) -> ProcessRecord | None:
        """The record of one process of this machine."""
        return next((record for record in self.records if record.pid == pid), None)

    @property
    def ready_workers(self) -> int:
        """Workers that take requests and have loaded all they serve."""
        workers = [record for record in self.records if record.service == "worker"]
        return sum(
            record.healthy
            and not record.worker.draining
            and all(variant.ready for variant in record.worker.variants)
            for record in workers
        )


async def look(redis: Redis, keys: Keys) -> Sighting:
    """Read the registry once; never raises for an absent Redis."""
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            records = await Registry(redis, keys).living()
    except AWAY:
        return Sighting(redis_answers=False)
    return Sighting(redis_answers=True, records=records)


async def health_of(address: str, *, is_gateway: bool, timeout_s: float = LOOK_TIMEOUT_S) -> str:
    """SERVING, NOT_SERVING, or why it did not answer."""
    opened = open_gateway(local_address(address), (), None) if is_gateway else open_channel(address)
    async with opened as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def healths_of(records: Sequence[ProcessRecord | None]) -> list[str]:
    """`health_of` for many, at once; empty for those that are not there."""

    async def ask(record: ProcessRecord | None) -> str:
        if record is None or not record.grpc_address:
            return ""
        return await health_of(record.grpc_address, is_gateway=record.service == "gateway")

    return list(await asyncio.gather(*(ask(record) for record in records)))
