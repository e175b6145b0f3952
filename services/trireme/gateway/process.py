"""One gateway, built top to bottom and running until its block ends."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry, new_process_id
from trireme.bus.request_records import RequestRecords
from trireme.gateway.admission import AdmissionControl
from trireme.gateway.generation import Generation
from trireme.gateway.grpc_api import InferenceServicer
from trireme.gateway.identity import GrpcGate, gate_of
from trireme.gateway.metrics import Metrics
from trireme.gateway.models import load_catalog
from trireme.gateway.oip.servicer import SERVICE_NAME as OIP_SERVICE_NAME
from trireme.gateway.oip.servicer import OpenInferenceServicer
from trireme.gateway.openai_api.app import openai_server
from trireme.gateway.openai_api.background import Background
from trireme.gateway.operator_page.fleet_picture import Channels, fleet_picture
from trireme.gateway.operator_page.server import OperatorPage, operator_server
from trireme.gateway.quotas import Quotas
from trireme.gateway.readiness import fleet_answers
from trireme.gateway.recovery import Recovery
from trireme.gateway.request_table import RequestTable
from trireme.gateway.request_traces import RequestTraces
from trireme.gateway.settings import Settings
from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.fleet import load_fleet
from trireme.runtime.health import HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.shutdown import end_tasks
from trireme.runtime.spans import NoSpans, Spans
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from trireme.wire.oip.v2.oip_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

SERVICE_NAME = "trireme.wire.inference.v1.Inference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A running gateway."""

    gateway_id: str
    grpc_address: str
    http_address: str
    operator_address: str
    """Empty where there is no page for operators."""
    core: Generation
    links: WorkerLinks
    health: HealthReporter
    background: Background

    async def leave(self, *, drain_s: float) -> None:
        """Say NOT_SERVING, take nothing new, and let the answers come to their end for `drain_s`."""
        await self.health.stop_serving()
        await self.background.leave()
        await self.core.leave(drain_s=drain_s)


@asynccontextmanager
async def running_gateway(settings: Settings, spans: Spans | None = None) -> AsyncIterator[Gateway]:
    """Serve until the block ends; the spans of requests go to `spans`.

    Raises:
        InvalidConfiguration, InvalidCheckpoint: the fleet file or a checkpoint is not right.
    """
    fleet = load_fleet(settings.fleet)
    catalog = load_catalog(fleet)
    gateway_id = new_process_id("gateway")
    started_s = time.time()
    keys = Keys(settings.bus_prefix)
    gate, certificates = gate_of(settings), settings.certificates()
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        stack.callback(gate.audit.close)
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        registry = Registry(redis, keys)
        records = RequestRecords(redis, keys)
        links = WorkerLinks(registry, gateway_id=gateway_id, metrics=metrics)
        recovery = Recovery(
            redis,
            keys,
            records=records,
            links=links,
            metrics=metrics,
            gateway_id=gateway_id,
            silence_s=settings.silence_s,
        )
        table = RequestTable(links, metrics, on_lost=recovery.worker_lost, on_unknown=recovery.unknown)
        links.listen(table)
        recovery.watch(table)
        tenants = partial(getattr, gate.book, "tenants") if gate.book else dict
        admission = AdmissionControl(
            redis,
            keys,
            records=records,
            links=links,
            catalog=catalog,
            slo=fleet.slo,
            max_waiting=settings.max_waiting,
            retry_after_s=settings.retry_after_s,
            metrics=metrics,
            tenants=tenants,
        )
        core = Generation(
            settings=settings,
            gateway_id=gateway_id,
            fleet_name=fleet.name,
            catalog=catalog,
            records=records,
            links=links,
            table=table,
            recovery=recovery,
            metrics=metrics,
            traces=RequestTraces(spans or NoSpans(), keep=settings.kept_timelines),
            admission=admission,
            quotas=Quotas(redis, keys, tenants) if gate.book else None,
        )
        answers = partial(fleet_answers, links)
        health = HealthReporter({SERVICE_NAME: answers, OIP_SERVICE_NAME: answers})
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        running = [
            tasks.create_task(links.run()),
            tasks.create_task(recovery.run()),
            tasks.create_task(admission.run()),
        ]
        if gate.book is not None:
            running.append(tasks.create_task(gate.book.watch()))
        stack.push_async_callback(end_tasks, running)
        servicer = InferenceServicer(core, links, stall_s=settings.stall_s)
        oip_servicer = OpenInferenceServicer(core, links, stall_s=settings.stall_s)
        grpc_address = await stack.enter_async_context(
            grpc_server(
                settings.grpc_listen,
                [
                    partial(add_InferenceServicer_to_server, servicer),
                    partial(add_GRPCInferenceServiceServicer_to_server, oip_servicer),
                ],
                service_names=[SERVICE_NAME, OIP_SERVICE_NAME],
                health=health,
                drain_s=1.0,
                interceptors=[GrpcGate(gate)],
                for_clients=True,
                certificates=certificates,
                # Beside those that are held, as many as are being read, checked or refused over HTTP.
                max_concurrent_rpcs=settings.max_inflight + settings.max_connections,
            )
        )
        background = Background(redis, keys, settings, core, gateway_id=gateway_id)
        running += [tasks.create_task(work) for work in background.running()]
        routes = background.routes()
        http = openai_server(settings, core, links, health, routes, gate=gate, certificates=certificates)
        http_address = await stack.enter_async_context(http)
        if settings.metrics_listen:
            shown = metrics_server(settings.metrics_listen, metrics.registry, health)
            await stack.enter_async_context(shown)
        operator_address = ""
        if settings.operator_listen:
            channels = Channels(open_channel)
            look = partial(fleet_picture, redis, keys, registry, channels)
            page = OperatorPage(look, core.traces.timelines, gateway_id=gateway_id)
            operator = operator_server(settings.operator_listen, page, gate, certificates)
            operator_address = await stack.enter_async_context(operator)
            stack.push_async_callback(channels.keep, set())

        # Whatever ends this process, its clients' requests go on and are theirs to resume.
        stack.push_async_callback(core.leave, drain_s=0.0)
        stack.push_async_callback(background.leave)

        def describe() -> ProcessRecord:
            found = fleet_answers(links)
            return ProcessRecord(
                id=gateway_id,
                service="gateway",
                grpc_address=grpc_address,
                http_address=http_address,
                node=settings.node,
                pid=os.getpid(),
                started_unix_s=started_s,
                healthy=found.healthy,
                status=found.status,
                fleet=str(settings.fleet),
            )

        await stack.enter_async_context(registry.membership(describe))
        yield Gateway(
            gateway_id=gateway_id,
            grpc_address=grpc_address,
            http_address=http_address,
            operator_address=operator_address,
            core=core,
            links=links,
            health=health,
            background=background,
        )
