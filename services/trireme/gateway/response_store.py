"""Responses that outlive their call: in Redis, where every gateway finds them.

A response is a hash (what was asked, how it stands) and a list (its output, an entry per token).
The list is what makes a replay exact: an event's sequence number follows from its entry's place,
whoever reads it. Only stored output goes through Redis, a few writes a second for each background
response; calls that wait for their answer are stored at their end.

A tenant's shelf has bounds. Where one is reached the oldest ended responses make room; responses
that still run never do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.errors import ObjectNotFound, Overloaded, StorageFull
from trireme.gateway.shelves import Evict, Put, ShelfLimits, Shelves

OPEN = ("queued", "in_progress")

_APPEND = """
-- ARGV: first index, ttl, id, then entries
if redis.call('HGET', KEYS[1], 'open') ~= '1' then return {0, ''} end
redis.call('HSET', KEYS[1], 'state', 'in_progress')
local have = redis.call('LLEN', KEYS[2])
if tonumber(ARGV[1]) > have then return {-1, tostring(have)} end
local size = 0
for i = 4 + have - tonumber(ARGV[1]), #ARGV do
  redis.call('RPUSH', KEYS[2], ARGV[i])
  size = size + #ARGV[i]
end
redis.call('EXPIRE', KEYS[2], ARGV[2])
if size > 0 and redis.call('HEXISTS', KEYS[3], ARGV[3]) == 1 then
  redis.call('HINCRBY', KEYS[3], ARGV[3], size)
  redis.call('HINCRBY', KEYS[3], '*', size)
end
return {1, ''}
"""

_END = """
-- ARGV: state, final, ttl
if redis.call('HGET', KEYS[1], 'open') ~= '1' then return 0 end
redis.call('HSET', KEYS[1], 'open', '0', 'state', ARGV[1], 'final', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""

APPENDED_AT_ONCE = 2048
"""Entries in one write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response as it stands."""

    response_id: str
    tenant: str
    state: str
    """As the API has it: queued, in_progress, completed, incomplete, failed, cancelled."""
    asked: dict[str, Any]
    """What does not change: see `responses_asking.Asked`."""
    final: dict[str, Any] | None
    """What came with the end: usage, error, time."""

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


class ResponseStore:
    """The responses of one fleet."""

    def __init__(self, redis: Redis, keys: Keys, limits: ShelfLimits) -> None:
        self._redis = redis
        self._shelves = Shelves(redis, keys, kind="response", limits=limits)
        self._append = redis.register_script(_APPEND)
        self._end = redis.register_script(_END)

    async def open(self, response_id: str, tenant: str, asked: dict[str, Any]) -> bool:
        """Keep a background response that is to run; False where it is known already.

        Raises:
            Overloaded: so many of the tenant's run already.
            StorageFull: the tenant's shelf is full of responses that run.
        """
        fields = {"tenant": tenant, "open": "1", "state": "queued", "asked": json.dumps(asked)}
        return await self._put(response_id, tenant, fields, runs=True)

    async def keep(
        self,
        response_id: str,
        tenant: str,
        asked: dict[str, Any],
        *,
        state: str,
        final: dict[str, Any],
        output: Sequence[str],
    ) -> None:
        """Keep a response that has ended, with its output; one that is known stays as it is.

        Raises:
            StorageFull: there is no room for it.
        """
        if await self._redis.exists(self._shelves.object(response_id)):
            return
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._shelves.parts(response_id))
            for start in range(0, len(output), APPENDED_AT_ONCE):
                pipe.rpush(self._shelves.parts(response_id), *output[start : start + APPENDED_AT_ONCE])
            pipe.expire(self._shelves.parts(response_id), self._shelves.ttl_s)
            await pipe.execute()
        fields = {
            "tenant": tenant,
            "open": "0",
            "state": state,
            "asked": json.dumps(asked),
            "final": json.dumps(final),
        }
        try:
            await self._put(response_id, tenant, fields, more_bytes=sum(map(len, output)))
        except StorageFull:
            await self._redis.delete(self._shelves.parts(response_id))
            raise

    async def load(self, response_id: str, tenant: str | None) -> StoredResponse:
        """The response; `tenant` None: whoever's.

        Raises:
            ObjectNotFound: there is none of that id, or it is another tenant's.
        """
        row = await self._redis.hmget(
            self._shelves.object(response_id), ["tenant", "state", "asked", "final"]
        )
        return _stored(response_id, tenant, cast(list[bytes | None], row))

    async def follow(self, response_id: str, tenant: str, first: int) -> tuple[StoredResponse, list[str]]:
        """The response and its output from entry `first` on, of one moment.

        Raises:
            ObjectNotFound: as `load` does.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(self._shelves.object(response_id), ["tenant", "state", "asked", "final"])
            pipe.lrange(self._shelves.parts(response_id), first, -1)
            row, entries = await pipe.execute()
        return _stored(response_id, tenant, row), [entry.decode() for entry in entries]

    async def append(self, response_id: str, tenant: str, first: int, entries: Sequence[str]) -> bool:
        """Add output whose first entry is number `first`; what is there already is not added again.

        Returns False where the response has ended, or is gone.
        """
        for start in range(0, max(1, len(entries)), APPENDED_AT_ONCE):
            part = entries[start : start + APPENDED_AT_ONCE]
            code, said = await self._append(
                keys=[
                    self._shelves.object(response_id),
                    self._shelves.parts(response_id),
                    self._shelves.sizes(tenant),
                ],
                args=[first + start, self._shelves.ttl_s, response_id, *part],
            )
            if code < 0:
                raise AssertionError(f"output from {first + start} on, but {said.decode()} entries are there")
            if code == 0:
                return False
        return True

    async def end(self, response_id: str, *, state: str, final: dict[str, Any]) -> bool:
        """End an open response; False where it had ended: the first end counts."""
        return bool(
            await self._end(
                keys=[self._shelves.object(response_id), self._shelves.parts(response_id)],
                args=[state, json.dumps(final), self._shelves.ttl_s],
            )
        )

    async def delete(self, response_id: str, tenant: str) -> None:
        """Forget it."""
        await self._shelves.drop(response_id, tenant)

    async def _put(
        self,
        response_id: str,
        tenant: str,
        fields: dict[str, str],
        *,
        runs: bool = False,
        more_bytes: int = 0,
    ) -> bool:
        size = sum(map(len, fields.values())) + more_bytes
        outcome = await self._shelves.put(
            response_id, tenant, fields, size=size, evict=Evict.ENDED, runs=runs
        )
        limits = self._shelves.limits
        if outcome is Put.TOO_MANY_OPEN:
            raise Overloaded(f"{limits.max_open} background responses run for this tenant, its limit")
        if outcome is Put.FULL:
            raise StorageFull(
                f"a tenant's stored responses may have {limits.max_bytes} bytes: ask with store=false, "
                "or delete some"
            )
        return outcome is Put.DONE


def _stored(response_id: str, tenant: str | None, row: list[bytes | None]) -> StoredResponse:
    owner, state, asked, final = row
    if owner is None or state is None or asked is None or tenant not in (None, owner.decode()):
        raise ObjectNotFound(f"no response {response_id[:80]!r} here", param="response_id")
    return StoredResponse(
        response_id=response_id,
        tenant=owner.decode(),
        state=state.decode(),
        asked=json.loads(asked),
        final=json.loads(final) if final else None,
    )
