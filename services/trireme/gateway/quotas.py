"""Requests and tokens a minute of each tenant, in the whole fleet.

Each quota is a bucket that holds a minute's worth and fills evenly; its level lies in Redis, where
one script charges both. A request takes its prompt and the longest answer it asked for, at most a
bucket, and gives back at its end what it did not use; what it used beyond leaves the bucket in
debt. Without Redis nobody is admitted anyway, so quotas need no rule of their own for that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.errors import Overloaded
from trireme.runtime.tenant_keys import Tenant

log = logging.getLogger(__name__)

WINDOW_S = 60
INFLIGHT_RETRY_S = 1.0
MAX_SHOWN = 65536
"""Tenants whose last standing is kept for headers."""

_CHARGE = """
-- ARGV: requests a minute (0: no bound), tokens a minute, requests and tokens wanted, 1: whatever the level
local stamp = redis.call('TIME')
local now = tonumber(stamp[1]) + tonumber(stamp[2]) / 1000000
local known = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens')
local passed = math.max(0, now - tonumber(known[1] or now))
local levels, wait, longest = {}, 0, 60
for i = 1, 2 do
  local bound, wanted = tonumber(ARGV[i]), tonumber(ARGV[i + 2])
  local level = bound
  if bound > 0 then
    level = math.min(bound, tonumber(known[i + 1] or bound) + passed * bound / 60)
    if wanted > level and ARGV[5] ~= '1' then wait = math.max(wait, (wanted - level) * 60 / bound) end
  end
  levels[i] = level
end
if wait == 0 then
  for i = 1, 2 do
    local bound = tonumber(ARGV[i])
    if bound > 0 then
      levels[i] = math.min(bound, levels[i] - tonumber(ARGV[i + 2]))
      longest = math.max(longest, (bound - levels[i]) * 60 / bound)
    end
  end
  redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now), 'requests', tostring(levels[1]),
             'tokens', tostring(levels[2]))
  redis.call('EXPIRE', KEYS[1], math.ceil(longest) + 60)
end
return {string.format('%.3f', wait), string.format('%.3f', levels[1]), string.format('%.3f', levels[2])}
"""


@dataclass(slots=True)
class Reservation:
    """What one request took."""

    tenant: str
    tokens: int
    """Taken of the tokens; 0 where they have no bound."""
    open: bool = True


@dataclass(frozen=True, slots=True)
class Standing:
    """What a tenant has left, when that was last asked."""

    bound: int
    left: float
    at_s: float

    def now(self, now_s: float) -> tuple[int, float]:
        """What is left now, and the seconds until the bucket is full."""
        left = min(self.bound, self.left + (now_s - self.at_s) * self.bound / WINDOW_S)
        return max(0, math.floor(left)), (self.bound - left) * WINDOW_S / self.bound


class Quotas:
    """The tenants' quotas, as one gateway keeps to them."""

    def __init__(self, redis: Redis, keys: Keys, tenants: Callable[[], Mapping[str, Tenant]]) -> None:
        """`tenants`: the bounds that hold now."""
        self._charge = redis.register_script(_CHARGE)
        self._keys = keys
        self._tenants = tenants
        self._inflight: Counter[str] = Counter()
        self._standings: dict[str, dict[str, Standing]] = {}

    async def reserve(self, tenant: str, tokens: int) -> Reservation | None:
        """Take one request and so many tokens; None for a tenant without bounds.

        Raises:
            Overloaded: there is not so much left; says when there will be.
            One of AWAY: Redis does not answer.
        """
        bounds = self._tenants().get(tenant)
        if bounds is None:
            return None
        if bounds.max_inflight and self._inflight[tenant] >= bounds.max_inflight:
            raise Overloaded(
                f"{bounds.max_inflight} of your requests run at this gateway, your limit",
                retry_after_s=INFLIGHT_RETRY_S,
            )
        taken = min(tokens, bounds.tokens_per_minute)
        self._inflight[tenant] += 1
        try:
            if bounds.requests_per_minute or bounds.tokens_per_minute:
                wait_s = await self._take(tenant, bounds, 1, taken)
                if wait_s > 0:
                    raise Overloaded(_refusal(bounds, taken), retry_after_s=wait_s)
        except BaseException:
            self._let_go(tenant)
            raise
        return Reservation(tenant, taken)

    async def settle(self, reservation: Reservation, *, tokens: int | None) -> None:
        """The request ended and used so many tokens; None: it never began, and counts for nothing.

        Settling twice has no effect. While Redis is away nothing is given back: a minute does it, too.
        """
        if not reservation.open:
            return
        reservation.open = False
        self._let_go(reservation.tenant)
        bounds = self._tenants().get(reservation.tenant)
        if bounds is None or not (bounds.requests_per_minute or bounds.tokens_per_minute):
            return
        more = (tokens or 0) - reservation.tokens if bounds.tokens_per_minute else 0
        if more or tokens is None:
            try:
                await self._take(reservation.tenant, bounds, -1 if tokens is None else 0, more, force=True)
            except AWAY as error:
                log.warning("quota_not_settled", extra={"tenant": reservation.tenant, "error": str(error)})

    def headers(self, tenant: str) -> dict[str, str]:
        """What an HTTP response says of the tenant's quotas: as OpenAI does, and as the IETF's draft does."""
        shown: dict[str, str] = {}
        policies, states = [], []
        now_s = time.monotonic()
        for name, standing in self._standings.get(tenant, {}).items():
            left, full_s = standing.now(now_s)
            shown[f"x-ratelimit-limit-{name}"] = str(standing.bound)
            shown[f"x-ratelimit-remaining-{name}"] = str(left)
            shown[f"x-ratelimit-reset-{name}"] = f"{full_s:.3f}s"
            policies.append(f'"{name}";q={standing.bound};w={WINDOW_S}')
            states.append(f'"{name}";r={left};t={math.ceil(full_s)}')
        if policies:
            shown["RateLimit-Policy"] = ", ".join(policies)
            shown["RateLimit"] = ", ".join(states)
        return shown

    async def _take(
        self, tenant: str, bounds: Tenant, requests: int, tokens: int, *, force: bool = False
    ) -> float:
        """Charge both; returns the seconds to wait where there is not so much, and nothing was taken."""
        minute = (bounds.requests_per_minute, bounds.tokens_per_minute)
        answer = await self._charge(
            keys=[self._keys.quota(tenant)], args=[*minute, requests, tokens, int(force)]
        )
        wait_s, *left = (float(value) for value in answer)
        if len(self._standings) >= MAX_SHOWN and tenant not in self._standings:
            self._standings.clear()
        at_s = time.monotonic()
        self._standings[tenant] = {
            name: Standing(bound, level, at_s)
            for name, bound, level in zip(("requests", "tokens"), minute, left, strict=True)
            if bound
        }
        return wait_s

    def _let_go(self, tenant: str) -> None:
        self._inflight[tenant] -= 1
        if self._inflight[tenant] <= 0:
            del self._inflight[tenant]


def _refusal(bounds: Tenant, tokens: int) -> str:
    parts = []
    if bounds.requests_per_minute:
        parts.append(f"{bounds.requests_per_minute} requests")
    if bounds.tokens_per_minute:
        parts.append(f"{bounds.tokens_per_minute} tokens")
    return (
        f"your quota of {' and '.join(parts)} a minute is used up: this request may take {tokens} tokens; "
        "ask later, or for a shorter answer"
    )
