"""Workers as pods of a cluster: its controllers run them, placement says how many.

Nothing else imports this module, since the client that it needs is an extra: trireme[kubernetes].
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from trireme.bus.connection import Keys, persistently
from trireme.bus.registry import Registry
from trireme.errors import InvalidConfiguration
from trireme.placement.kubernetes_api import CALL_TIMEOUT_S, FIELD_MANAGER, open_kubernetes
from trireme.placement.kubernetes_lease import ACTING_SHARE, LeaderLease
from trireme.placement.kubernetes_metrics import KubernetesCollector
from trireme.placement.kubernetes_scaler import KubernetesScaler
from trireme.placement.kubernetes_servicer import KubernetesServicer
from trireme.placement.replica_wishes import ReplicaWishes
from trireme.placement.settings import Settings
from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.clock import Clock
from trireme.runtime.fleet import Fleet
from trireme.runtime.health import Health

SHORTEST_LEASE_S = CALL_TIMEOUT_S / (1 - ACTING_SHARE)
"""A call that a holder began ends before anyone else may act."""


class KubernetesBackend:
    """A `Backend`: the scaler of a release's workloads with its gRPC face."""

    def __init__(self, scaler: KubernetesScaler, servicer: KubernetesServicer) -> None:
        self.servicer = servicer
        self.collector = KubernetesCollector(scaler)
        self._scaler = scaler

    def health(self) -> Health:
        """Progress of the scaler; degraded is healthy, and told."""
        return self._scaler.health()

    async def run(self) -> None:
        """Scale for ever."""
        await self._scaler.run()

    async def stop(self) -> None:
        """Let another replica lead; the workers go on."""
        await self._scaler.lease.release()


@asynccontextmanager
async def open_kubernetes_backend(
    settings: Settings,
    fleet: Fleet,
    redis: Redis,
    registry: Registry,
    loader: VariantLoader,
    clock: Clock,
    *,
    identity: str,
) -> AsyncIterator[KubernetesBackend]:
    """With what Scale had asked for before; waits for Redis, and not for the cluster.

    Raises:
        InvalidConfiguration: a setting is missing, or there is no way to the cluster.
    """
    if not settings.release_selector:
        raise InvalidConfiguration(
            "which workloads are this fleet's? Set TRIREME_PLACEMENT_RELEASE_SELECTOR",
            param="TRIREME_PLACEMENT_RELEASE_SELECTOR",
        )
    if settings.lease_s < SHORTEST_LEASE_S:
        raise InvalidConfiguration(
            f"a lease of {settings.lease_s} s is too short: {SHORTEST_LEASE_S:.0f} s at least",
            param="TRIREME_PLACEMENT_LEASE_S",
        )
    if not 1 <= settings.watch_s < settings.stale_s:
        raise InvalidConfiguration(
            f"watches of {settings.watch_s} s cannot keep within {settings.stale_s:.0f} s: raise stale_s",
            param="TRIREME_PLACEMENT_WATCH_S",
        )
    wishes = ReplicaWishes(fleet, redis, Keys(settings.bus_prefix))
    await persistently(wishes.refresh, what="replica_wishes")
    async with open_kubernetes(settings.kubeconfig, settings.namespace, clock) as api:
        lease = LeaderLease(api, settings.lease, identity, duration_s=settings.lease_s, clock=clock)
        scaler = KubernetesScaler(
            api,
            wishes,
            lease,
            clock,
            release_selector=settings.release_selector,
            yielding=frozenset((*settings.take_replicas_from, FIELD_MANAGER)),
            period_s=settings.period_s,
            watch_s=settings.watch_s,
            stale_s=settings.stale_s,
        )
        servicer = KubernetesServicer(scaler, registry, loader, drain_timeout_s=settings.drain_timeout_s)
        yield KubernetesBackend(scaler, servicer)
