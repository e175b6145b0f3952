"""`python -m trireme.placement`: everything is built here, once, top to bottom."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from functools import partial

import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.errors import InvalidConfiguration
from trireme.placement.backend import Backend
from trireme.placement.processes_backend import ObservingBackend, ProcessesBackend
from trireme.placement.servicer import ObservingServicer
from trireme.placement.settings import Settings
from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.clock import Clock, SystemClock
from trireme.runtime.fleet import Fleet, load_fleet
from trireme.runtime.health import Health, HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import end_tasks, stop_requested
from trireme.runtime.telemetry import configure_logging
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2_grpc as rpc

SERVICE_NAME = "trireme.wire.placement.v1.Placement"


async def serve(settings: Settings) -> None:
    """Run until a signal asks to stop; then drain and stop the workers."""
    fleet = load_fleet(settings.fleet)
    clock = SystemClock()
    process_id = new_process_id("placement")
    started_unix_s = time.time()
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        await persistently(redis.ping, what="start")
        keys = Keys(settings.bus_prefix)
        registry = Registry(redis, keys)
        backend = await open_backend(settings, fleet, redis, registry, clock, process_id, stack)
        metrics = CollectorRegistry()
        if backend.collector is not None:
            metrics.register(backend.collector)
        health = HealthReporter({SERVICE_NAME: backend.health})
        register = partial(rpc.add_PlacementServicer_to_server, backend.servicer)
        address = await stack.enter_async_context(
            grpc_server(settings.listen, [register], service_names=[SERVICE_NAME], health=health)
        )
        metrics_address = await stack.enter_async_context(
            metrics_server(settings.metrics_listen, metrics, health)
        )

        def describe() -> ProcessRecord | None:
            found: Health = health.overall()
            if not found.healthy:
                return None
            return ProcessRecord(
                id=process_id,
                service="placement",
                grpc_address=settings.advertise or address,
                http_address=metrics_address,
                node=settings.node,
                pid=os.getpid(),
                started_unix_s=started_unix_s,
                healthy=True,
                status=found.status,
                fleet=fleet.name,
            )

        await stack.enter_async_context(registry.membership(describe))
        await run(backend)


async def open_backend(
    settings: Settings,
    fleet: Fleet,
    redis: Redis,
    registry: Registry,
    clock: Clock,
    process_id: str,
    stack: AsyncExitStack,
) -> Backend:
    """What the settings name; what it opens is closed with `stack`.

    Raises:
        InvalidConfiguration: there is no such backend, or its client is not installed.
    """
    loader = VariantLoader(fleet)
    if settings.backend == "kubernetes":
        try:
            from trireme.placement.kubernetes_backend import open_kubernetes_backend
        except ModuleNotFoundError as error:
            raise InvalidConfiguration(
                f"there is no module {error.name}: install trireme[kubernetes]",
                param="TRIREME_PLACEMENT_BACKEND",
            ) from error
        opening = open_kubernetes_backend(
            settings, fleet, redis, registry, loader, clock, identity=process_id
        )
        return await stack.enter_async_context(opening)
    if settings.backend != "processes":
        raise InvalidConfiguration(
            f"no backend {settings.backend!r}: processes or kubernetes", param="TRIREME_PLACEMENT_BACKEND"
        )
    if not settings.supervise:
        return ObservingBackend(ObservingServicer(registry, loader, drain_timeout_s=settings.drain_timeout_s))
    return await ProcessesBackend.open(settings, fleet, redis, registry, loader, clock)


async def run(backend: Backend) -> None:
    """Reconcile until a signal asks to stop. A failure of ours leaves the workers alone, to be adopted."""
    reconciling = asyncio.create_task(backend.run())
    stop = asyncio.create_task(stop_requested())
    await asyncio.wait([reconciling, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if reconciling.done():
        reconciling.result()
    await end_tasks([reconciling])
    await backend.stop()


def main() -> None:
    """Entry point."""
    settings = load(Settings, os.environ, prefix="TRIREME_PLACEMENT_")
    configure_logging("placement", level=settings.log_level)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
