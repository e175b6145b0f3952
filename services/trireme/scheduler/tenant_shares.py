"""The tenants' virtual token counters, shared by all replicas through Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.policies.fair_sharing import lift

log = logging.getLogger(__name__)

REFRESH_S = 0.25
MAX_TENANTS = 4096
"""Counters kept: names that clients make up must not fill Redis, nor slow its readers."""


class TenantShares:
    """A cached copy of the counters; own charges count at once, others' at the next refresh."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.virtual_tokens
        self._unsent: dict[str, float] = {}
        self.counters: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        """As their newest requests say, of tenants that do not weigh 1."""

    def join(self, tenant: str, *, active: Iterable[str]) -> None:
        """A tenant starts to wait after an absence."""
        lifted = lift(self.counters, tenant=tenant, active=active)
        self.charge(tenant, lifted - self.counters.get(tenant, 0.0))

    def note_weight(self, tenant: str, weight: float) -> None:
        """The tenant has this weight now."""
        if weight == 1.0:
            self.weights.pop(tenant, None)
            return
        self.weights[tenant] = weight
        if len(self.weights) > MAX_TENANTS:
            del self.weights[next(iter(self.weights))]

    def charge(self, tenant: str, weighted_tokens: float) -> None:
        """The tenant was served so much more."""
        if weighted_tokens:
            self.counters[tenant] = self.counters.get(tenant, 0.0) + weighted_tokens
            self._unsent[tenant] = self._unsent.get(tenant, 0.0) + weighted_tokens

    async def synchronise(self, *, waiting: Container[str] = ()) -> None:
        """Send own charges, read the sums; of too many tenants forget some that do not wait."""
        unsent, self._unsent = self._unsent, {}
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                for tenant, amount in unsent.items():
                    pipe.hincrbyfloat(self._key, tenant, amount)
                pipe.hgetall(self._key)
                rows = cast(dict[bytes, bytes], (await pipe.execute())[-1])
        except AWAY:
            for tenant, amount in unsent.items():
                self._unsent[tenant] = self._unsent.get(tenant, 0.0) + amount
            raise
        self.counters = {name.decode(): float(value) for name, value in rows.items()}
        if len(self.counters) > MAX_TENANTS:
            await self._forget_some(waiting)
        for tenant, amount in self._unsent.items():
            self.counters[tenant] = self.counters.get(tenant, 0.0) + amount

    async def _forget_some(self, waiting: Container[str]) -> None:
        # The least served lose least: they would be lifted anyway when they come back.
        absent = [name for name in self.counters if name not in waiting]
        absent.sort(key=self.counters.__getitem__)
        forgotten = absent[: len(self.counters) - MAX_TENANTS // 2]
        if forgotten:
            await self._redis.hdel(self._key, *forgotten)
            self.counters = {name: self.counters[name] for name in self.counters.keys() - set(forgotten)}
            log.info("tenants_forgotten", extra={"tenants": len(forgotten)})

    async def run(self, waiting: Callable[[], Container[str]]) -> None:
        """Synchronise for ever; `waiting` names the tenants that wait now."""
        while True:
            try:
                await self.synchronise(waiting=waiting())
            except AWAY:
                pass
            await asyncio.sleep(REFRESH_S)
