"""A process that behaves like a service towards its supervisor, and does nothing else.

It keeps a lease in the registry, answers gRPC health and ends on SIGTERM. Files in
STAND_IN_DIR steer it: `<service>.fails` makes it die at its start, `<service>.slow` makes
it ignore SIGTERM. A worker also answers LoadVariant and UnloadVariant.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.runtime.fleet import load_fleet
from trireme.runtime.health import HealthReporter, always_healthy
from trireme.runtime.serving import grpc_server
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord, VariantStatus, WorkerStatus
from trireme.wire.worker.v1 import worker_pb2, worker_pb2_grpc


class StandInWorker(worker_pb2_grpc.WorkerServicer):
    """Loads and unloads names."""

    def __init__(self, variants: list[str]) -> None:
        self.variants = variants

    async def LoadVariant(self, request, context):
        self.variants.append(request.variant)
        return worker_pb2.LoadVariantResponse()

    async def UnloadVariant(self, request, context):
        self.variants.remove(request.variant)
        return worker_pb2.UnloadVariantResponse()


async def serve(service: str) -> None:
    def setting(name: str) -> str:
        return os.environ[f"TRIREME_{service.upper()}_{name}"]

    steering = Path(os.environ.get("STAND_IN_DIR", "/nonexistent"))
    if (steering / f"{service}.fails").exists():
        sys.exit(f"{service} was told to fail")
    stop = asyncio.Event()
    if not (steering / f"{service}.slow").exists():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    worker = StandInWorker([])
    if service == "worker":
        fleet = load_fleet(Path(setting("FLEET")))
        group = next(group for group in fleet.workers if group.name == setting("GROUP"))
        worker.variants += fleet.served_by(group)
        assert setting("INDEX").isdigit()
    listen = setting("GRPC_LISTEN" if service == "gateway" else "LISTEN")
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(setting("REDIS_URL")))
        await persistently(redis.ping, what="start")
        registry = Registry(redis, Keys(setting("BUS_PREFIX")))
        health = HealthReporter({service: always_healthy})
        register = partial(worker_pb2_grpc.add_WorkerServicer_to_server, worker)
        address = await stack.enter_async_context(
            grpc_server(listen, [register], service_names=[], health=health)
        )
        process_id, started_unix_s = new_process_id(service), time.time()

        def describe() -> ProcessRecord | None:
            if (steering / f"{service}.stalls").exists():
                return None
            variants = [VariantStatus(variant=name, ready=True) for name in worker.variants]
            return ProcessRecord(
                id=process_id,
                service=service,
                grpc_address=address,
                node=setting("NODE"),
                pid=os.getpid(),
                started_unix_s=started_unix_s,
                healthy=True,
                status="ok",
                worker=WorkerStatus(device="null", variants=variants) if service == "worker" else None,
            )

        await stack.enter_async_context(registry.membership(describe))
        await stop.wait()


def main(service: str) -> None:
    asyncio.run(serve(service))
