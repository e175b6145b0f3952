"""`python -m trireme.scheduler`: everything is built here, once, top to bottom."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from functools import partial

import uvloop

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry, new_process_id
from trireme.bus.request_records import SCHEDULERS, RequestRecords
from trireme.bus.streams import Stream
from trireme.runtime.health import Health, HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.spans import Spans, spans_to_collector
from trireme.runtime.telemetry import configure_logging
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.fleet_view import FleetView
from trireme.scheduler.hints import HintPublisher
from trireme.scheduler.metrics import Metrics
from trireme.scheduler.reaper import Reaper
from trireme.scheduler.servicer import SchedulerServicer
from trireme.scheduler.settings import Settings
from trireme.scheduler.tenant_shares import TenantShares
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Event, ProcessRecord
from trireme.wire.inference.v1.inference_pb2 import FinishReason
from trireme.wire.scheduler.v1.scheduler_pb2_grpc import add_SchedulerServicer_to_server

log = logging.getLogger(__name__)

STALLED_S = 5.0
"""The dispatch loop turns at least twice a second; silence for so long is a stall."""


async def serve(settings: Settings, spans: Spans) -> None:
    """Run one replica until SIGTERM."""
    scheduler_id = new_process_id("scheduler")
    keys = Keys(settings.bus_prefix)
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        requests = Stream(redis, keys.requests, AdmittedRequest)
        events = Stream(redis, keys.events, Event, max_entries=100_000)
        records = RequestRecords(redis, keys)
        view = FleetView(redis, keys, queue_limit=settings.queue_limit)
        shares = TenantShares(redis, keys)
        dispatcher = Dispatcher(
            scheduler_id=scheduler_id,
            requests=requests,
            records=records,
            view=view,
            shares=shares,
            metrics=metrics,
            spans=spans,
            window_requests=settings.window_requests,
        )
        reaper = Reaper(
            redis,
            keys,
            scheduler_id=scheduler_id,
            requests=requests,
            events=events,
            records=records,
            dispatcher=dispatcher,
            metrics=metrics,
        )
        hints = HintPublisher(redis, keys, scheduler_id=scheduler_id, dispatcher=dispatcher, view=view)
        dispatcher.on_assigned = hints.note_assigned
        await persistently(partial(requests.create_group, SCHEDULERS), what="create group")

        def progress() -> Health:
            age_s = time.monotonic() - dispatcher.last_progress_s
            if age_s > STALLED_S:
                return Health(healthy=False, status=f"no dispatch for {age_s:.1f} s")
            return Health(healthy=True)

        health = HealthReporter({"trireme.wire.scheduler.v1.Scheduler": progress})
        servicer = SchedulerServicer(records=records, requests=requests, dispatcher=dispatcher, shares=shares)
        address = await stack.enter_async_context(
            grpc_server(
                settings.listen,
                [partial(add_SchedulerServicer_to_server, servicer)],
                service_names=["trireme.wire.scheduler.v1.Scheduler"],
                health=health,
            )
        )
        http_address = await stack.enter_async_context(
            metrics_server(settings.metrics_listen, metrics.registry, health)
        )
        started_s = time.time()

        def describe() -> ProcessRecord | None:
            found = progress()
            if not found.healthy:
                return None
            metrics.waiting.set(sum(dispatcher.waiting_by_tenant().values()))
            metrics.oldest.set(dispatcher.oldest_s())
            return ProcessRecord(
                id=scheduler_id,
                service="scheduler",
                grpc_address=address,
                http_address=http_address,
                node=settings.node,
                pid=os.getpid(),
                started_unix_s=started_s,
                healthy=True,
                status=found.status,
                fleet=settings.fleet,
            )

        registry = Registry(redis, keys)
        async with registry.membership(describe), asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(work)
                for work in (
                    view.run(),
                    view.follow_residency(),
                    shares.run(dispatcher.waiting_by_tenant),
                    dispatcher.read(),
                    dispatcher.dispatch(),
                    reaper.run(),
                    hints.run(),
                    _learn_from_answers(events, dispatcher, hints, view),
                )
            ]
            log.info("serving", extra={"scheduler_id": scheduler_id, "grpc": address})
            await stop_requested()
            for task in running:
                task.cancel()


async def _learn_from_answers(
    events: Stream[Event], dispatcher: Dispatcher, hints: HintPublisher, view: FleetView
) -> None:
    async for entry in events.tail():
        if entry.fact.HasField("finished"):
            finished = entry.fact.finished
            hints.assigned.note_end(finished.worker_id, finished.request_id)
            view.note_ended(finished.worker_id, tenant=finished.tenant)
            # An answer that was cut off, or that is no text, says nothing of the next one's length.
            if finished.usage.completion_tokens and finished.reason in (
                FinishReason.FINISH_REASON_STOP,
                FinishReason.FINISH_REASON_LENGTH,
            ):
                dispatcher.note_answer(finished.model, finished.usage.completion_tokens)


def main() -> None:
    settings = load(Settings, os.environ, prefix="TRIREME_SCHEDULER_")
    configure_logging("scheduler", level=settings.log_level)
    uvloop.run(serve(settings, spans_to_collector("scheduler")))


if __name__ == "__main__":
    main()
