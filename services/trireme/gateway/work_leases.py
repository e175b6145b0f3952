"""Who drives what goes on without a client: a lease in Redis for each background response and batch.

A gateway renews the leases of what it drives. Where one ends, its gateway is dead or stuck, and
whoever asks first takes the work over. Times are Redis' own, so gateways' clocks do not matter.
A holder that was too slow may still be at work beside its successor: what either writes is fenced
by position, not by the lease.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis

from trireme.bus.connection import Keys

LEASE_S = 6.0
"""Work whose lease was not renewed for so long is taken over."""

_NOW = """
local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
"""

_TAKE = (
    _NOW
    + """
redis.call('ZADD', KEYS[1], now_ms() + tonumber(ARGV[2]), ARGV[3])
redis.call('HSET', KEYS[2], ARGV[3], ARGV[1])
return 1
"""
)

_CLAIM = (
    _NOW
    + """
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms(), 'LIMIT', 0, ARGV[3])
for _, id in ipairs(found) do
  redis.call('ZADD', KEYS[1], now_ms() + tonumber(ARGV[2]), id)
  redis.call('HSET', KEYS[2], id, ARGV[1])
end
return found
"""
)

_RENEW = (
    _NOW
    + """
local lost = {}
for i = 3, #ARGV do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[1], 'XX', now_ms() + tonumber(ARGV[2]), ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

_RELEASE = """
if redis.call('HGET', KEYS[2], ARGV[2]) ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
if ARGV[3] == 'done' then
  redis.call('ZREM', KEYS[1], ARGV[2])
else
  redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[2])
end
return 1
"""


class WorkLeases:
    """The leases on one kind of work, as one gateway holds them."""

    def __init__(self, redis: Redis, keys: Keys, *, kind: str, holder: str) -> None:
        self._keys = [keys.work(kind), keys.work_holders(kind)]
        self._holder = holder
        self._lease_ms = int(LEASE_S * 1000)
        self._take = redis.register_script(_TAKE)
        self._claim = redis.register_script(_CLAIM)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)

    async def take(self, work_id: str) -> None:
        """Make new work known, held here."""
        await self._take(keys=self._keys, args=[self._holder, self._lease_ms, work_id])

    async def claim(self, count: int) -> list[str]:
        """Take over work that nobody holds any more, at most so much."""
        found = await self._claim(keys=self._keys, args=[self._holder, self._lease_ms, count])
        return [work_id.decode() for work_id in found]

    async def renew(self, work_ids: Sequence[str]) -> list[str]:
        """Hold on to these; returns those that others have taken over or ended."""
        if not work_ids:
            return []
        lost = await self._renew(keys=self._keys, args=[self._holder, self._lease_ms, *work_ids])
        return [work_id.decode() for work_id in lost]

    async def release(self, work_id: str) -> None:
        """Let any gateway take it over at once."""
        await self._release(keys=self._keys, args=[self._holder, work_id, "free"])

    async def done(self, work_id: str) -> None:
        """There is nothing left to do; nothing happens where another holds it now."""
        await self._release(keys=self._keys, args=[self._holder, work_id, "done"])
