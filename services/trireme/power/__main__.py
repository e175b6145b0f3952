"""`python -m trireme.power`: everything is built here, once, top to bottom."""

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
from trireme.bus.streams import Stream
from trireme.devices.meter_selection import Calibration, open_meters
from trireme.devices.meters import EnergyMeter
from trireme.devices.modelled_nvml import ModelledGpu, ModelledNvml
from trireme.devices.nvml import Nvml
from trireme.errors import InvalidConfiguration
from trireme.power.carbon_signal import open_signal
from trireme.power.ledger_store import LedgerStore
from trireme.power.metering import Metering, WorkerNodes
from trireme.power.metrics import registry_of
from trireme.power.request_energy import FinishedRequests
from trireme.power.servicer import PowerServicer
from trireme.power.settings import Settings
from trireme.runtime.clock import Clock, SystemClock
from trireme.runtime.fleet import Power, load_fleet
from trireme.runtime.health import Health, HealthReporter
from trireme.runtime.metrics_server import metrics_server
from trireme.runtime.serving import grpc_server
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.telemetry import configure_logging
from trireme.wire.bus.v1.facts_pb2 import Directive, Event, Measurement, ProcessRecord
from trireme.wire.power.v1.power_pb2_grpc import add_PowerServicer_to_server

log = logging.getLogger(__name__)

SERVICE_NAME = "trireme.wire.power.v1.Power"
STALLED_S = 15.0
"""A window ends every second; with Redis away one takes a few. Silence for so long is a stall."""


async def serve(settings: Settings) -> None:
    """Run until SIGTERM."""
    process_id = new_process_id("power")
    keys, clock = Keys(settings.bus_prefix), SystemClock()
    power, devices = _what_to_meter(settings)
    meters = _meters(settings, power, devices, clock)
    carbon = open_signal(
        power.carbon, clock, refresh_s=settings.carbon_refresh_s, max_age_s=settings.carbon_max_age_s
    )
    finished = FinishedRequests(capacity=settings.finished_requests)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        registry = Registry(redis, keys)
        metering = Metering(
            node=settings.node,
            meters=meters,
            carbon=carbon,
            store=LedgerStore(redis, keys, settings.node),
            measurements=Stream(redis, keys.measurements, Measurement, max_entries=100_000),
            directives=Stream(redis, keys.directives, Directive, max_entries=10_000),
            workers=WorkerNodes(registry, settings.node),
            clock=clock,
            process_id=process_id,
            window_s=settings.window_s,
        )
        await persistently(metering.open, what="open ledger")

        def progress() -> Health:
            age_s = clock.monotonic_s() - metering.last_turn_s
            if age_s > STALLED_S:
                return Health(healthy=False, status=f"no window for {age_s:.1f} s")
            return Health(healthy=True, status=metering.trouble() or "ok")

        health = HealthReporter({SERVICE_NAME: progress})
        servicer = PowerServicer(metering=metering, finished=finished)
        address = await stack.enter_async_context(
            grpc_server(
                settings.listen,
                [partial(add_PowerServicer_to_server, servicer)],
                service_names=[SERVICE_NAME],
                health=health,
            )
        )
        http_address = await stack.enter_async_context(
            metrics_server(settings.metrics_listen, registry_of(metering), health)
        )
        started_s = time.time()

        def describe() -> ProcessRecord | None:
            found = progress()
            if not found.healthy:
                return None
            return ProcessRecord(
                id=process_id,
                service="power",
                grpc_address=settings.advertise or address,
                http_address=http_address,
                node=settings.node,
                pid=os.getpid(),
                started_unix_s=started_s,
                healthy=True,
                status=found.status,
                fleet=str(settings.fleet or ""),
            )

        async with registry.membership(describe), asyncio.TaskGroup() as tasks:
            events = Stream(redis, keys.events, Event)
            running = [
                tasks.create_task(work) for work in (metering.run(), carbon.run(), finished.follow(events))
            ]
            log.info(
                "serving",
                extra={"process_id": process_id, "grpc": address, "meters": [m.description for m in meters]},
            )
            await stop_requested()
            for task in running:
                task.cancel()


def _what_to_meter(settings: Settings) -> tuple[Power, list[str]]:
    """The fleet's power section and the device slices of its workers."""
    if settings.fleet is None:
        return Power(), ["cpu", *(f"cuda:{index}" for index in range(len(settings.modelled_gpu_w)))]
    fleet = load_fleet(settings.fleet)
    return fleet.power, [group.device for group in fleet.workers]


def _meters(settings: Settings, power: Power, devices: list[str], clock: Clock) -> tuple[EnergyMeter, ...]:
    calibration = Calibration(idle_w=settings.cpu_idle_w, max_w=settings.cpu_max_w, alpha=settings.cpu_alpha)
    nvml: Nvml | None = None
    if settings.modelled_gpu_w:
        try:
            gpus = [ModelledGpu(idle_w=float(idle_w)) for idle_w in settings.modelled_gpu_w]
        except ValueError as error:
            raise InvalidConfiguration(f"modelled_gpu_w: {error}", param="modelled_gpu_w") from error
        nvml = ModelledNvml(gpus, clock)
    return open_meters(power.meter, devices, calibration=calibration, nvml=nvml)


def main() -> None:
    settings = load(Settings, os.environ, prefix="TRIREME_POWER_")
    configure_logging("power", level=settings.log_level)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
