"""Workers as processes of this node: started, adopted and stopped here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.placement.desired import DesiredFleet
from trireme.placement.metrics import PlacementCollector
from trireme.placement.process_table import ProcessTable
from trireme.placement.reconciler import Reconciler
from trireme.placement.servicer import ObservingServicer, PlacementServicer
from trireme.placement.settings import Settings
from trireme.placement.variant_loader import VariantLoader
from trireme.policies.placement import Limits
from trireme.runtime.clock import Clock
from trireme.runtime.fleet import Fleet
from trireme.runtime.health import Health
from trireme.wire.bus.v1.facts_pb2 import Directive


class ProcessesBackend:
    """A `Backend`: the reconciler of this node's processes with its gRPC face."""

    def __init__(
        self,
        reconciler: Reconciler,
        servicer: PlacementServicer,
        collector: PlacementCollector,
        *,
        drain_timeout_s: float,
    ) -> None:
        self.servicer = servicer
        self.collector = collector
        self._reconciler = reconciler
        self._drain_timeout_s = drain_timeout_s

    @classmethod
    async def open(
        cls,
        settings: Settings,
        fleet: Fleet,
        redis: Redis,
        registry: Registry,
        loader: VariantLoader,
        clock: Clock,
    ) -> ProcessesBackend:
        """With what this run had changed before, and the workers that a killed placement left behind."""
        keys = Keys(settings.bus_prefix)
        desired = DesiredFleet(fleet, redis, keys, run_id=settings.run_id)
        await desired.restore()
        reconciler = Reconciler(
            desired=desired,
            table=ProcessTable(
                command=settings.worker_words,
                environ=worker_environ(settings, os.environ),
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
        collector = PlacementCollector(desired, reconciler)
        return cls(reconciler, servicer, collector, drain_timeout_s=settings.drain_timeout_s)

    def health(self) -> Health:
        """Progress of the reconciler."""
        return self._reconciler.health()

    async def run(self) -> None:
        """Reconcile for ever."""
        await self._reconciler.run()

    async def stop(self) -> None:
        """Drain and stop the workers."""
        await self._reconciler.stop_workers(timeout_s=self._drain_timeout_s)


class ObservingBackend:
    """A `Backend` where someone else starts the workers: it shows them and passes control calls on."""

    collector = None

    def __init__(self, servicer: ObservingServicer) -> None:
        self.servicer = servicer

    def health(self) -> Health:
        """Its answering is its progress."""
        return Health(healthy=True)

    async def run(self) -> None:
        """There is nothing to do, for ever."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """The workers are not its own."""


def worker_environ(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the workers, without group and index."""
    return {
        **environ,
        "TRIREME_WORKER_REDIS_URL": settings.redis_url,
        "TRIREME_WORKER_BUS_PREFIX": settings.bus_prefix,
        "TRIREME_WORKER_FLEET": str(settings.fleet),
        "TRIREME_WORKER_NODE": settings.node,
        "TRIREME_WORKER_LISTEN": "127.0.0.1:0",
        "TRIREME_WORKER_METRICS_LISTEN": "127.0.0.1:0",
    }
