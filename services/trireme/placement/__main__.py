"""`python -m trireme.placement`: everything is built here, once, top to bottom."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from functools import partial

import uvloop
from prometheus_client import CollectorRegistry

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.bus.streams import Stream
from trireme.placement.desired import DesiredFleet
from trireme.placement.metrics import PlacementCollector
from trireme.placement.process_table import ProcessTable
from trireme.placement.reconciler import Reconciler
from trireme.placement.servicer import ObservingServicer, PlacementServicer
from trireme.placement.settings import Settings
from trireme.placement.variant_loader import VariantLoader
from trireme.policies.placement import Limits
from trireme.runtime.clock import SystemClock
from trireme.runtime.fleet import load_fleet
from trireme.runtime.health import Health, HealthReporter, always_healthy
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.telemetry import configure_logging
from trireme.wire.bus.v1.facts_pb2 import Directive, ProcessRecord
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
        loader = VariantLoader(fleet)
        reconciler: Reconciler | None = None
        servicer: rpc.PlacementServicer
        metrics = CollectorRegistry()
        if settings.supervise:
            desired = DesiredFleet(fleet, redis, keys, run_id=settings.run_id)
            await desired.restore()
            reconciler = Reconciler(
                desired=desired,
                table=ProcessTable(
                    command=settings.worker_words,
                    environ=worker_environ(settings),
                    log_dir=settings.run_dir / "logs",
                    threads={group.name: group.threads for group in fleet.workers},
                ),
                registry=registry,
                directives=Stream(redis, keys.directives, Directive, max_entries=10_000),
                loader=loader,
                limits=Limits(
                    surge=settings.surge,
                    lease_grace_s=settings.lease_grace_s,
                    start_timeout_s=settings.start_timeout_s,
                    drain_timeout_s=settings.drain_timeout_s,
                ),
                clock=clock,
                period_s=settings.period_s,
                load_retry_s=settings.load_retry_s,
            )
            reconciler.adopt()
            servicer = PlacementServicer(desired, reconciler, clock)
            metrics.register(PlacementCollector(desired, reconciler))
        else:
            servicer = ObservingServicer(registry, loader, drain_timeout_s=settings.drain_timeout_s)

        probe = reconciler.health if reconciler is not None else always_healthy
        health = HealthReporter({SERVICE_NAME: probe})
        register = partial(rpc.add_PlacementServicer_to_server, servicer)
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
        await run(reconciler, drain_timeout_s=settings.drain_timeout_s)


async def run(reconciler: Reconciler | None, *, drain_timeout_s: float) -> None:
    """Reconcile until a signal asks to stop. A failure of ours leaves the workers alone, to be adopted."""
    if reconciler is None:
        await stop_requested()
        return
    reconciling = asyncio.create_task(reconciler.run())
    stop = asyncio.create_task(stop_requested())
    await asyncio.wait([reconciling, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if reconciling.done():
        reconciling.result()
    reconciling.cancel()
    await asyncio.wait([reconciling])
    await reconciler.stop_workers(timeout_s=drain_timeout_s)


def worker_environ(settings: Settings) -> dict[str, str]:
    """The environment of the workers, without group and index."""
    return {
        **os.environ,
        "TRIREME_WORKER_REDIS_URL": settings.redis_url,
        "TRIREME_WORKER_BUS_PREFIX": settings.bus_prefix,
        "TRIREME_WORKER_FLEET": str(settings.fleet),
        "TRIREME_WORKER_NODE": settings.node,
        "TRIREME_WORKER_LISTEN": "127.0.0.1:0",
        "TRIREME_WORKER_METRICS_LISTEN": "127.0.0.1:0",
    }


def main() -> None:
    """Entry point."""
    settings = load(Settings, os.environ, prefix="TRIREME_PLACEMENT_")
    configure_logging("placement", level=settings.log_level)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
