"""`python -m trireme.kvstore`: everything is built here, once, top to bottom."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.bus.streams import Stream
from trireme.errors import InvalidConfiguration
from trireme.kvcache.arena import SHARED_MEMORY, Arena, own_arena
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.tiered_store import TieredStore
from trireme.kvstore.garbage import set_aside_blocks
from trireme.kvstore.hints import HintFollower
from trireme.kvstore.metrics import KvStoreCollector
from trireme.kvstore.peers import Peers
from trireme.kvstore.reports import health_of, publish_measurements
from trireme.kvstore.servicer import KvStoreServicer
from trireme.kvstore.settings import Settings, Sizes, sizes_of
from trireme.runtime.clock import SystemClock
from trireme.runtime.health import HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.telemetry import configure_logging
from trireme.wire.bus.v1.facts_pb2 import Hint, Measurement, ProcessRecord
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

log = logging.getLogger(__name__)

SERVICE_NAME = "trireme.wire.kvstore.v1.KvStore"
_MEASUREMENTS = 100_000


async def serve(settings: Settings) -> None:
    """Run until a signal asks to stop; then write what is in DRAM to SSD.

    Raises:
        InvalidConfiguration: the fleet file is wrong, or there is no room for the arena.
    """
    clock = SystemClock()
    sizes = sizes_of(settings)
    process_id = new_process_id("kvstore")
    started_unix_s = time.time()
    async with AsyncExitStack() as stack:
        arena = _open_arena(settings, sizes, stack)
        files = SegmentFiles(settings.directory) if sizes.ssd_bytes else None
        opened = TieredStore.opened(arena, files, ssd_bytes=sizes.ssd_bytes, clock=clock, limits=sizes.limits)
        store = await stack.enter_async_context(opened)

        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        await persistently(redis.ping, what="start")
        keys = Keys(settings.bus_prefix)
        measurements = Stream(redis, keys.measurements, Measurement, max_entries=_MEASUREMENTS)
        hints = Stream(redis, keys.hints(settings.node), Hint)

        registry = Registry(redis, keys)
        peers = Peers(store, process_id=process_id, fleet=sizes.fleet_name)
        metrics = CollectorRegistry()
        metrics.register(KvStoreCollector(store, peers.counters, node=settings.node))
        health = HealthReporter({SERVICE_NAME: lambda: health_of(store, clock)})
        servicer = KvStoreServicer(store, peers, node=settings.node)
        register = partial(rpc.add_KvStoreServicer_to_server, servicer)
        store.sweep()

        stop_prefault = threading.Event()
        stack.callback(stop_prefault.set)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(asyncio.to_thread(arena.prefault, stop_prefault)),
                tasks.create_task(store.run()),
                tasks.create_task(publish_measurements(store, measurements, node=settings.node, clock=clock)),
                tasks.create_task(HintFollower(store, peers, clock=clock).follow(hints)),
                tasks.create_task(peers.follow(registry)),
                tasks.create_task(set_aside_blocks(store)),
            ]
            async with AsyncExitStack() as serving:
                address = await serving.enter_async_context(
                    grpc_server(settings.listen, [register], service_names=[SERVICE_NAME], health=health)
                )
                metrics_address = await serving.enter_async_context(
                    metrics_server(settings.metrics_listen, metrics, health)
                )

                def describe() -> ProcessRecord | None:
                    found = health_of(store, clock)
                    if not found.healthy:
                        return None
                    return ProcessRecord(
                        id=process_id,
                        service="kvstore",
                        grpc_address=settings.advertise or address,
                        http_address=metrics_address,
                        node=settings.node,
                        pid=os.getpid(),
                        started_unix_s=started_unix_s,
                        healthy=True,
                        status=found.status,
                        fleet=sizes.fleet_name,
                    )

                await serving.enter_async_context(registry.membership(describe))
                await stop_requested()
            if store.ssd is not None and not settings.ephemeral:
                kept = await store.flush(deadline_s=settings.flush_s)
            else:
                # Without an SSD that stays, what is here would be lost: another node may have use for it.
                kept = await peers.push(store.newest_runs(), deadline_s=settings.flush_s)
            log.info("kv_flushed", extra={"blocks": kept})
            for task in running:
                task.cancel()


def _open_arena(settings: Settings, sizes: Sizes, stack: AsyncExitStack) -> Arena:
    """The arena, in the first directory that has room for it."""
    faults = []
    for directory in _arena_directories(settings):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            owned = own_arena(directory, dram_bytes=sizes.dram_bytes, ssd_bytes=sizes.ssd_bytes)
            return stack.enter_context(owned)
        except OSError as error:
            faults.append(f"{directory}: {error.strerror or error}")
            log.warning("kv_arena_refused", extra={"directory": str(directory), "error": str(error)})
    raise InvalidConfiguration(
        f"no room for an arena of {sizes.dram_bytes} bytes ({'; '.join(faults)}): lower dram_mib",
        param="dram_mib",
    )


def _arena_directories(settings: Settings) -> list[Path]:
    if settings.arena_directory is not None:
        return [settings.arena_directory]
    return [SHARED_MEMORY, settings.directory]


def main() -> None:
    """Entry point."""
    settings = load(Settings, os.environ, prefix="TRIREME_KVSTORE_")
    configure_logging("kvstore", level=settings.log_level)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
