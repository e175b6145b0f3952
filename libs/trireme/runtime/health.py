"""Health is progress: what a process says of itself follows from its last completed step.

Each service name has a probe. A task asks the probes and publishes changes, so that
`grpc.health.v1.Health/Watch` is live. The empty name is the whole process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Health:
    """What a probe found."""

    healthy: bool
    status: str = "ok"
    """One line; says what is wrong where something is."""


Probe = Callable[[], Health]


def always_healthy() -> Health:
    """For processes whose answering is their progress."""
    return Health(healthy=True)


class _Servicer(HealthServicer):  # type: ignore[misc]
    """The library's, and `List`, which it leaves out."""

    async def List(self, request: object, context: object) -> health_pb2.HealthListResponse:
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)


class HealthReporter:
    """Keeps the `grpc.health.v1` servicer in step with the probes."""

    def __init__(self, probes: Mapping[str, Probe], *, period_s: float = 0.5) -> None:
        self.servicer = _Servicer()
        self._probes = dict(probes)
        self._period_s = period_s
        self._last: dict[str, Health] = {}
        self._stopping = False

    def overall(self) -> Health:
        """The first unhealthy probe's finding, or health."""
        if self._stopping:
            return Health(healthy=False, status="stopping")
        findings = [_finding(probe) for probe in self._probes.values()]
        return next((found for found in findings if not found.healthy), Health(healthy=True))

    async def refresh(self) -> None:
        """Ask every probe once and publish what changed."""
        found = {} if self._stopping else {name: _finding(p) for name, p in self._probes.items()}
        found[""] = self.overall()
        for name, health in found.items():
            if self._last.get(name) == health:
                continue
            if name in self._last or not health.healthy:
                fields = {"probe": name, "healthy": health.healthy, "status": health.status}
                log.info("health_changed", extra=fields)
            self._last[name] = health
            await self.servicer.set(name, _serving(health.healthy))

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._period_s)

    async def stop_serving(self) -> None:
        """Say NOT_SERVING everywhere, before a drain."""
        self._stopping = True
        await self.servicer.enter_graceful_shutdown()


def _finding(probe: Probe) -> Health:
    # A reporter that ended here would show the last good finding for ever.
    try:
        return probe()
    except Exception as error:
        return Health(healthy=False, status=f"its probe failed: {error!r}")


def _serving(healthy: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    if healthy:
        return health_pb2.HealthCheckResponse.SERVING
    return health_pb2.HealthCheckResponse.NOT_SERVING
