"""The tenants' virtual token counters, shared by all replicas through Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.policies.fair_sharing import lift

log = logging.getLogger(__name__)

REFRESH_S = 0.25


class TenantShares:
    """A cached copy of the counters; own charges count at once, others' at the next refresh."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.virtual_tokens
        self._unsent: dict[str, float] = {}
        self.counters: dict[str, float] = {}

    def join(self, tenant: str, *, active: Iterable[str]) -> None:
        """A tenant starts to wait after an absence."""
        lifted = lift(self.counters, tenant=tenant, active=active)
        self.charge(tenant, lifted - self.counters.get(tenant, 0.0))

    def charge(self, tenant: str, weighted_tokens: float) -> None:
        """The tenant was served so much more."""
        if weighted_tokens:
            self.counters[tenant] = self.counters.get(tenant, 0.0) + weighted_tokens
            self._unsent[tenant] = self._unsent.get(tenant, 0.0) + weighted_tokens

    async def synchronise(self) -> None:
        """Send own charges, read the sums."""
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
        for tenant, amount in self._unsent.items():
            self.counters[tenant] = self.counters.get(tenant, 0.0) + amount

    async def run(self) -> None:
        """Synchronise for ever."""
        while True:
            try:
                await self.synchronise()
            except AWAY:
                pass
            await asyncio.sleep(REFRESH_S)
