"""`python -m trireme.worker`: everything is built here, once, top to bottom."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import uvloop

from trireme.bus.connection import AWAY, Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.bus.request_records import WORKERS, RequestRecords
from trireme.bus.streams import Stream
from trireme.errors import InvalidConfiguration
from trireme.kvcache.store_client import StoreClient
from trireme.policies.prefix_index import split_hashes
from trireme.runtime.fleet import Fleet, WorkerGroup, load_fleet
from trireme.runtime.health import Health, HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.spans import Spans, spans_to_collector
from trireme.runtime.telemetry import configure_logging
from trireme.wire.bus.v1.facts_pb2 import (
    Assignment,
    Directive,
    Event,
    Hint,
    Measurement,
    ProcessRecord,
    Residency,
    WorkerStatus,
)
from trireme.wire.worker.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from trireme.worker.billing import Biller
from trireme.worker.block_loads import BlockLoads
from trireme.worker.block_saves import BlockSaves
from trireme.worker.engine_client import EngineClient, Listeners
from trireme.worker.engine_messages import Cancel
from trireme.worker.intake import Intake
from trireme.worker.metrics import EngineCollector, registry_of
from trireme.worker.queue_hints import QueueHints
from trireme.worker.reports import report_measurements, report_residency
from trireme.worker.request_chains import RequestChains
from trireme.worker.request_table import RequestTable
from trireme.worker.servicer import WorkerServicer
from trireme.worker.settings import Settings
from trireme.worker.step_news import StepNews, Turn
from trireme.worker.turn_events import publish_turns, turn_events
from trireme.worker.variant_plan import plan_from_request, plans_of
from trireme.worker.variants import VariantTable
from trireme.worker.vllm_aliases import VllmAliases

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 75
"""Exit status after the lease ended: others have this worker's requests now."""
LINGER_S = 0.5
"""A draining worker reads assignments so much longer: schedulers see it draining a moment late."""
PATIENCE = 2
"""Deadlines of the store that the engine waits for stored blocks: the worker, which answers, keeps to one."""
SERVICE_NAME = "trireme.wire.worker.v1.Worker"


async def serve(settings: Settings, spans: Spans) -> None:
    """Run one worker until SIGTERM, then drain."""
    fleet = load_fleet(settings.fleet)
    group = _group(fleet, settings.group)
    worker_id = new_process_id(f"worker-{group.name}-{settings.index}")
    started_s = time.time()
    keys = Keys(settings.bus_prefix)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        records = RequestRecords(redis, keys)
        registry = Registry(redis, keys)
        events = Stream(redis, keys.events, Event, max_entries=100_000)
        assignments = Stream(redis, keys.assignments(worker_id), Assignment)
        biller = Biller(group.device, node=settings.meter_node or settings.node)
        tasks_of_turns: set[asyncio.Task[None]] = set()

        def deliver(news: StepNews) -> None:
            joules, engine_s = table.on_step(news)
            loaded = variants.find(news.variant)
            if loaded is None:
                return  # its last step ended while it was unloaded
            loaded.note_step(news)
            aliases.note_step(news)
            loaded.billed_joules += joules
            loaded.billed_engine_s += engine_s
            if news.turns:
                tell_of_turns(news.turns)
            for cut in news.chains:
                found = table.choice_of(cut.handle)
                if found is not None:
                    chains.cut(*found, split_hashes(cut.hashes))
            saves.note_complete(loaded, loaded.take_unsaved())
            for output in news.outputs:
                live = table.request_of(output.handle) if output.finish_reason is not None else None
                if live is not None and live.is_complete:
                    saves.note_end(loaded, live)

        def tell_of_turns(turns: tuple[Turn, ...]) -> None:
            stopped = turn_events(worker_id, turns, table.request_of)
            if stopped:
                tasks_of_turns.add(task := asyncio.create_task(publish_turns(events, stopped)))
                task.add_done_callback(tasks_of_turns.discard)

        listeners = Listeners(
            on_step=deliver,
            on_refused=lambda what: intake.refused(what),
            on_gone=lambda what: intake.gone(what),
            on_awaited=lambda what: loads.on_awaited(what),
            on_let_go=lambda what: loads.on_let_go(what),
        )
        engines = await stack.enter_async_context(
            EngineClient.running(
                listeners,
                threads=group.threads,
                patience_s=PATIENCE * settings.store_deadline_s,
                log_level=settings.log_level,
            )
        )
        variants = VariantTable(engines)
        table = RequestTable(
            worker_id=worker_id,
            records=records,
            events=events,
            biller=biller,
            spans=spans,
            cancel=lambda variant, handles: engines.send(Cancel(variant, handles)),
        )
        aliases = VllmAliases(variants)
        table.on_ended = aliases.note_end
        store = None
        if fleet.kvstore.enabled:
            find_store = _find_store(registry, settings.node)
            store = await stack.enter_async_context(StoreClient.open(find_store))
        chains = RequestChains()
        loads = BlockLoads(
            store,
            variants,
            engines.send,
            deadline_s=settings.store_deadline_s,
            always=settings.kv_load_always,
        )
        saves = BlockSaves(store, engines, variants, chains)
        hints = QueueHints(
            worker_id,
            loads,
            Stream(redis, keys.hints(settings.node), Hint, max_entries=256),
            is_here=table.holds,
        )
        intake = Intake(
            worker_id=worker_id,
            assignments=assignments,
            records=records,
            table=table,
            variants=variants,
            send=engines.send,
            loads=loads,
            chains=chains,
        )
        draining = asyncio.Event()

        def progress() -> Health:
            stalled_s = engines.stalled_s()
            if stalled_s > settings.stall_s:
                return Health(healthy=False, status=f"no engine step ended for {stalled_s:.1f} s")
            if draining.is_set():
                return Health(healthy=False, status="draining")
            if not any(loaded.ready for loaded in variants):
                return Health(healthy=False, status="no variant is loaded")
            return Health(healthy=True)

        async def drain(timeout_s: float) -> int:
            draining.set()
            deadline_s = time.monotonic() + timeout_s
            while table.computing and time.monotonic() < deadline_s:
                await asyncio.sleep(0.05)
            return table.computing

        health = HealthReporter({SERVICE_NAME: progress})
        servicer = WorkerServicer(
            table,
            variants,
            plan=partial(plan_from_request, group=group, block_tokens=fleet.block_tokens),
            drain=drain,
        )
        address = await stack.enter_async_context(
            grpc_server(
                settings.listen,
                [partial(add_WorkerServicer_to_server, servicer)],
                service_names=[SERVICE_NAME],
                health=health,
                drain_s=1.0,
            )
        )
        metrics = registry_of(EngineCollector(variants, engines.stalled_s))
        if settings.vllm_aliases:
            metrics.register(aliases)
        http_address = await stack.enter_async_context(
            metrics_server(settings.metrics_listen, metrics, health)
        )
        await persistently(partial(assignments.create_group, WORKERS), what="create group")

        def describe() -> ProcessRecord | None:
            stalled_s = engines.stalled_s()
            if stalled_s > settings.stall_s:
                return None
            found = progress()
            return ProcessRecord(
                id=worker_id,
                service="worker",
                grpc_address=address,
                http_address=http_address,
                node=settings.node,
                pid=os.getpid(),
                started_unix_s=started_s,
                healthy=found.healthy,
                status=found.status,
                fleet=fleet.name,
                meter_node=settings.meter_node,
                worker=WorkerStatus(
                    device=group.device,
                    variants=[loaded.status() for loaded in variants],
                    draining=draining.is_set(),
                    stalled_s=stalled_s if stalled_s > 1.0 else 0.0,
                ),
            )

        async with registry.membership(describe, on_lost=_fence), asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(intake.run()),
                tasks.create_task(_load_all(fleet, group, variants)),
                tasks.create_task(biller.follow(Stream(redis, keys.directives, Directive))),
                tasks.create_task(saves.run()),
                *([tasks.create_task(hints.run())] if store is not None else ()),
                tasks.create_task(
                    report_measurements(
                        worker_id,
                        group.device,
                        variants,
                        Stream(redis, keys.measurements, Measurement, max_entries=50_000),
                    )
                ),
                tasks.create_task(
                    report_residency(
                        worker_id, variants, Stream(redis, keys.residency, Residency, max_entries=20_000)
                    )
                ),
                tasks.create_task(_sweep(table, settings.orphan_s)),
            ]
            log.info("serving", extra={"worker_id": worker_id, "grpc": address})
            stopped = tasks.create_task(stop_requested())
            wanted = tasks.create_task(draining.wait())
            await asyncio.wait([stopped, wanted], return_when=asyncio.FIRST_COMPLETED)
            draining.set()
            intake.drain()
            await _announce(registry, describe())
            left, _ = await asyncio.gather(drain(settings.drain_s), asyncio.sleep(LINGER_S))
            await _until_confirmed(table, within_s=2.0)
            log.info("drained", extra={"handed_back": intake.handed_back, "left": left})
            await stopped
            for task in (*running, wanted):
                task.cancel()
        await table.settle()


async def _announce(registry: Registry, record: ProcessRecord | None) -> None:
    """Show the record at once; without Redis, or with a stalled engine, the lease tells the rest."""
    if record is None:
        return
    try:
        await registry.put(record)
    except AWAY:
        log.warning("draining_unannounced")


async def _until_confirmed(table: RequestTable, *, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while len(table) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)


async def _sweep(table: RequestTable, orphan_s: float) -> None:
    while True:
        await asyncio.sleep(1.0)
        table.sweep(orphan_s=orphan_s)


async def _load_all(fleet: Fleet, group: WorkerGroup, variants: VariantTable) -> None:
    for plan in plans_of(fleet, group):
        await variants.load(plan)


def _find_store(registry: Registry, node: str) -> Callable[[], Awaitable[str | None]]:
    """Where the node's KV store listens now; it may move when it restarts."""

    async def find() -> str | None:
        try:
            stores = await registry.living("kvstore")
        except AWAY:
            return None
        mine = [record for record in stores if record.node == node]
        # A killed store's lease holds for a while: the newest is the one that lives.
        newest = max(mine, key=lambda record: record.started_unix_s, default=None)
        return newest.grpc_address if newest is not None else None

    return find


def _group(fleet: Fleet, name: str) -> WorkerGroup:
    for group in fleet.workers:
        if group.name == name:
            return group
    known = ", ".join(group.name for group in fleet.workers)
    raise InvalidConfiguration(f"the fleet has no worker group {name!r}; it has {known}", param="group")


def _fence() -> None:
    log.critical("lease_lost")
    logging.shutdown()
    os._exit(EXIT_LEASE_LOST)


def main() -> None:
    settings = load(Settings, os.environ, prefix="TRIREME_WORKER_")
    configure_logging("worker", level=settings.log_level)
    uvloop.run(serve(settings, spans_to_collector("worker")))


if __name__ == "__main__":
    main()
