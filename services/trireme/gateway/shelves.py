"""What is kept for tenants in Redis: each object is a hash and its parts, and stands on its tenant's shelf.

A shelf has bounds in number and bytes, and so have all shelves of a kind together. The bookkeeping is one
script, so that gateways that add at once stay within them. An object that Redis let expire is taken off
its shelf's books when its room is wanted, and off the fleet's when the next one is kept.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys

_DROP_ONE = """
local function off_the_fleet(id)
  local size = redis.call('HGET', KEYS[5], id)
  if size then redis.call('HINCRBY', KEYS[5], '*', -tonumber(size)) end
  redis.call('HDEL', KEYS[5], id)
  redis.call('ZREM', KEYS[4], id)
  redis.call('SREM', KEYS[6], id)
end
local function is_open(id) return redis.call('HGET', ARGV[1] .. id, 'open') == '1' end
local function drop(id)
  local size = redis.call('HGET', KEYS[2], id)
  if size then redis.call('HINCRBY', KEYS[2], '*', -tonumber(size)) end
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[1], id)
  redis.call('SREM', KEYS[3], id)
  off_the_fleet(id)
  redis.call('DEL', ARGV[1] .. id, ARGV[1] .. id .. ':parts')
end
"""

_PUT = (
    _DROP_ONE
    + """
-- ARGV: prefix, id, now, ttl, max count, max bytes, size, max open (-1: it is not to run), evict,
-- the fleet's max count, max bytes, max open, fields
if redis.call('EXISTS', ARGV[1] .. ARGV[2]) == 1 then return 0 end
local max_open = tonumber(ARGV[8])
local function has_no_place(open_ids, most)
  if redis.call('SCARD', open_ids) < most then return false end
  for _, id in ipairs(redis.call('SMEMBERS', open_ids)) do
    if not is_open(id) then redis.call('SREM', open_ids, id) end
  end
  return redis.call('SCARD', open_ids) >= most
end
if max_open >= 0 and has_no_place(KEYS[3], max_open) then return -1 end
if max_open >= 0 and has_no_place(KEYS[6], tonumber(ARGV[12])) then return -3 end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', ARGV[3], 'LIMIT', 0, 256)) do
  local left_s = redis.call('TTL', ARGV[1] .. id)
  if left_s > 0 then redis.call('ZADD', KEYS[4], tonumber(ARGV[3]) + left_s, id) else off_the_fleet(id) end
end
local function is_fleet_full()
  return redis.call('ZCARD', KEYS[4]) >= tonumber(ARGV[10])
    or tonumber(redis.call('HGET', KEYS[5], '*') or '0') + tonumber(ARGV[7]) > tonumber(ARGV[11])
end
local function is_full()
  return redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[5])
    or tonumber(redis.call('HGET', KEYS[2], '*') or '0') + tonumber(ARGV[7]) > tonumber(ARGV[6])
end
if is_full() then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if redis.call('EXISTS', ARGV[1] .. id) == 0 then drop(id) end
  end
end
if is_full() and ARGV[9] == 'ended' then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if not is_open(id) then drop(id) end
    if not is_full() then break end
  end
end
if is_full() and ARGV[9] ~= 'unbounded' then return -2 end
if is_fleet_full() and ARGV[9] ~= 'unbounded' then return -4 end
for i = 13, #ARGV, 2 do redis.call('HSET', ARGV[1] .. ARGV[2], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', ARGV[1] .. ARGV[2], ARGV[4])
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[2], ARGV[7])
redis.call('HINCRBY', KEYS[2], '*', ARGV[7])
redis.call('ZADD', KEYS[4], tonumber(ARGV[3]) + tonumber(ARGV[4]), ARGV[2])
redis.call('HSET', KEYS[5], ARGV[2], ARGV[7])
redis.call('HINCRBY', KEYS[5], '*', ARGV[7])
if max_open >= 0 then
  redis.call('SADD', KEYS[3], ARGV[2])
  redis.call('SADD', KEYS[6], ARGV[2])
end
-- The shelf outlives what stands on it, also what runs for long before its time is counted.
for i = 1, 6 do redis.call('EXPIRE', KEYS[i], 2 * tonumber(ARGV[4]) + 604800) end
return 1
"""
)

_DROP = _DROP_ONE + "drop(ARGV[2]) return 1"


UNBOUNDED = 2**53
FULL_RETRY_S = 60.0
"""When to ask again where what is kept for all tenants has no room."""


class Put(enum.Enum):
    """What became of a new object."""

    DONE = 1
    KNOWN = 0
    TOO_MANY_OPEN = -1
    FULL = -2
    TOO_MANY_OPEN_IN_FLEET = -3
    FLEET_FULL = -4


class Evict(enum.StrEnum):
    """What makes room for a new object."""

    NOTHING = "nothing"
    ENDED = "ended"
    """The oldest objects that are not open."""
    UNBOUNDED = "unbounded"
    """Nothing, and it is kept all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfLimits:
    """What one tenant, and all of them, may keep of a kind."""

    max_count: int
    max_bytes: int
    max_open: int
    """Objects that are at work at once."""
    ttl_s: float
    """How long an object is kept after its end."""
    fleet_count: int = UNBOUNDED
    """Of all tenants together, as the two below."""
    fleet_bytes: int = UNBOUNDED
    fleet_open: int = UNBOUNDED


class Shelves:
    """All tenants' objects of one kind. An object's hash has a field `open`, 1 as long as it is at work."""

    def __init__(self, redis: Redis, keys: Keys, *, kind: str, limits: ShelfLimits) -> None:
        self.limits = limits
        self.ttl_s = max(1, int(limits.ttl_s))
        self._redis = redis
        self._keys = keys
        self._kind = kind
        self._put = redis.register_script(_PUT)
        self._drop = redis.register_script(_DROP)

    def object(self, object_id: str) -> str:
        """The key of an object's hash."""
        return self._keys.kept(self._kind, object_id)

    def parts(self, object_id: str) -> str:
        """The key of what it consists of."""
        return self._keys.kept(self._kind, object_id) + ":parts"

    def sizes(self, tenant: str) -> str:
        """The key of a shelf's sizes."""
        return self._keys.shelf_sizes(self._kind, tenant)

    async def put(
        self,
        object_id: str,
        tenant: str,
        fields: Mapping[str, str],
        *,
        size: int,
        evict: Evict = Evict.NOTHING,
        runs: bool = False,
        ttl_s: int | None = None,
    ) -> Put:
        """Keep an object; its parts, if it has any yet, are there already."""
        limits = self.limits
        outcome = await self._put(
            keys=self._shelf(tenant),
            args=[
                self._keys.kept(self._kind),
                object_id,
                time.time(),
                ttl_s or self.ttl_s,
                limits.max_count,
                limits.max_bytes,
                size,
                limits.max_open if runs else -1,
                evict.value,
                limits.fleet_count,
                limits.fleet_bytes,
                limits.fleet_open,
                *itertools.chain.from_iterable(fields.items()),
            ],
        )
        return Put(outcome)

    async def drop(self, object_id: str, tenant: str) -> None:
        """Forget an object and its parts."""
        await self._drop(keys=self._shelf(tenant), args=[self._keys.kept(self._kind), object_id])

    async def ids(self, tenant: str) -> list[str]:
        """A tenant's objects, oldest first; some may have expired."""
        found = cast(list[bytes], await self._redis.zrange(self._shelf(tenant)[0], 0, -1))
        return [object_id.decode() for object_id in found]

    def _shelf(self, tenant: str) -> list[str]:
        shelf = self._keys.shelf(self._kind, tenant)
        fleet = self._keys.shelf_of_all(self._kind)
        return [shelf, self.sizes(tenant), shelf + ":open", fleet, fleet + ":bytes", fleet + ":open"]
