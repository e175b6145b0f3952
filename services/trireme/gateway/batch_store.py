"""Batches in Redis: how each stands, and what came of its lines.

A line's result is written once, whoever writes first: two gateways that work on one batch, since
one was thought dead, put no line twice into its output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.errors import ObjectNotFound, Overloaded, StorageFull
from trireme.gateway.shelves import FULL_RETRY_S, Evict, Put, ShelfLimits, Shelves

STATES = ("validating", "in_progress", "finalizing", "cancelling")
"""Those in which there is something to do."""
_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
_MARKS = {True: "+", False: "-"}

_MOVE = """
-- ARGV: ttl, new state, whether it is open then, count of old states, old states, fields
local count = tonumber(ARGV[4])
local state = redis.call('HGET', KEYS[1], 'state')
local fits = false
for i = 5, 4 + count do if ARGV[i] == state then fits = true end end
if not fits then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'open', ARGV[3])
for i = 5 + count, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""

_RECORD = """
-- ARGV: line, result, whether it is a good one, ttl, prompt tokens, cached ones, answer tokens
if redis.call('HGET', KEYS[1], 'open') ~= '1' then return {0, 0} end
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 1 then
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  redis.call('HINCRBY', KEYS[1], ARGV[3] == '1' and 'num_good' or 'num_bad', 1)
  redis.call('HINCRBY', KEYS[1], 'num_bytes', #ARGV[2])
  redis.call('HINCRBY', KEYS[1], 'input_tokens', ARGV[5])
  redis.call('HINCRBY', KEYS[1], 'cached_tokens', ARGV[6])
  redis.call('HINCRBY', KEYS[1], 'output_tokens', ARGV[7])
end
return {1, tonumber(redis.call('HGET', KEYS[1], 'num_bytes') or '0')}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a line used."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A batch as it stands."""

    batch_id: str
    tenant: str
    state: str
    about: dict[str, Any]
    """What does not change: endpoint, input_file_id, completion_window, metadata, created_at,
    expires_at, output_ttl_s."""
    fields: dict[str, str]
    """What does."""

    @property
    def is_open(self) -> bool:
        return self.state in STATES

    @property
    def num_lines(self) -> int:
        return self.number("total")

    def number(self, name: str) -> int:
        """A count; 0 where there is none yet."""
        return int(self.fields.get(name, "0"))

    def shown(self) -> dict[str, Any]:
        """As OpenAI's API shows it."""
        fields, about = self.fields, self.about
        tokens = {name: self.number(name) for name in ("input_tokens", "cached_tokens", "output_tokens")}
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": about["endpoint"],
            "model": fields.get("model") or None,
            "errors": json.loads(fields["errors"]) if "errors" in fields else None,
            "input_file_id": about["input_file_id"],
            "completion_window": about["completion_window"],
            "status": self.state,
            "output_file_id": fields.get("output_file_id") or None,
            "error_file_id": fields.get("error_file_id") or None,
            "created_at": about["created_at"],
            "expires_at": about["expires_at"],
            **{name: int(fields[name]) if name in fields else None for name in _TIMES},
            "request_counts": {
                "total": self.num_lines,
                "completed": self.number("num_good"),
                "failed": self.number("num_bad"),
            },
            "usage": {
                "input_tokens": tokens["input_tokens"],
                "input_tokens_details": {"cached_tokens": tokens["cached_tokens"]},
                "output_tokens": tokens["output_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens["input_tokens"] + tokens["output_tokens"],
            },
            "metadata": about["metadata"],
        }


class BatchStore:
    """The batches of one fleet."""

    def __init__(self, redis: Redis, keys: Keys, limits: ShelfLimits) -> None:
        self._redis = redis
        self._shelves = Shelves(redis, keys, kind="batch", limits=limits)
        self._move = redis.register_script(_MOVE)
        self._record = redis.register_script(_RECORD)

    async def open(self, batch_id: str, tenant: str, about: dict[str, Any]) -> bool:
        """Keep a new batch; False where it is known already.

        Raises:
            Overloaded: so many of the tenant's, or of the fleet's, run already, or the fleet has no room.
            StorageFull: so many are kept already, and all of them run.
        """
        text = json.dumps(about)
        fields = {"tenant": tenant, "open": "1", "state": STATES[0], "about": text}
        outcome = await self._shelves.put(
            batch_id, tenant, fields, size=len(text), evict=Evict.ENDED, runs=True
        )
        limits = self._shelves.limits
        if outcome is Put.TOO_MANY_OPEN:
            raise Overloaded(
                f"{limits.max_open} batches run for this tenant, its limit", retry_after_s=FULL_RETRY_S
            )
        if outcome is Put.TOO_MANY_OPEN_IN_FLEET:
            raise Overloaded(
                f"{limits.fleet_open} batches run in the fleet, its limit", retry_after_s=FULL_RETRY_S
            )
        if outcome is Put.FLEET_FULL:
            raise Overloaded(
                f"the batches of all tenants may be {limits.fleet_count}: come back when some have expired",
                retry_after_s=FULL_RETRY_S,
            )
        if outcome is Put.FULL:
            raise StorageFull(f"a tenant's batches may be {limits.max_count}")
        return outcome is Put.DONE

    async def load(self, batch_id: str, tenant: str | None) -> StoredBatch:
        """The batch; `tenant` None: whoever's.

        Raises:
            ObjectNotFound: there is none of that id, or it is another tenant's.
        """
        found = await self.load_all([batch_id])
        if not found or tenant not in (None, found[0].tenant):
            raise ObjectNotFound(f"no batch {batch_id[:80]!r} here", param="batch_id")
        return found[0]

    async def load_all(self, batch_ids: Iterable[str]) -> list[StoredBatch]:
        """Those that are there."""
        named = list(batch_ids)
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in named:
                pipe.hgetall(self._shelves.object(batch_id))
            rows = cast(list[dict[bytes, bytes]], await pipe.execute())
        return [_batch(batch_id, row) for batch_id, row in zip(named, rows, strict=True) if row]

    async def ids(self, tenant: str) -> list[str]:
        """A tenant's batches, oldest first."""
        return await self._shelves.ids(tenant)

    async def move(self, batch_id: str, olds: Sequence[str], new: str, **fields: str | int) -> bool:
        """Take a batch from one of some states to another; False where it is in none of them."""
        stamp = {f"{new}_at": int(time.time())} if f"{new}_at" in _TIMES else {}
        flat = [word for pair in {**stamp, **fields}.items() for word in pair]
        is_open = "1" if new in STATES else "0"
        return bool(
            await self._move(
                keys=[self._shelves.object(batch_id)],
                args=[self._shelves.ttl_s, new, is_open, len(olds), *olds, *flat],
            )
        )

    async def note(self, batch_id: str, **fields: str) -> None:
        """Set fields of a batch that is there, whatever its state."""
        if await self._redis.exists(self._shelves.object(batch_id)):
            flat = [word for pair in fields.items() for word in pair]
            await self._redis.hset(self._shelves.object(batch_id), items=flat)

    async def record(
        self, batch_id: str, line: int, result: str, *, good: bool, tokens: Tokens
    ) -> int | None:
        """Write a line's result, unless there is one; bytes of all results, None where the batch ended."""
        taken, num_bytes = await self._record(
            keys=[self._shelves.object(batch_id), self._shelves.parts(batch_id)],
            args=[
                line,
                _MARKS[good] + result,
                int(good),
                self._shelves.ttl_s,
                tokens.prompt,
                tokens.cached,
                tokens.answer,
            ],
        )
        return num_bytes if taken else None

    async def recorded(self, batch_id: str) -> set[int]:
        """The lines that have a result."""
        return {int(line) for line in await self._redis.hkeys(self._shelves.parts(batch_id))}

    async def results(self, batch_id: str, lines: range) -> list[tuple[bool, str] | None]:
        """Results of these lines: whether good, and what; None where there is none."""
        if not lines:
            return []
        found = await self._redis.hmget(self._shelves.parts(batch_id), [str(line) for line in lines])
        values = cast(list[bytes | None], found)
        texts = [value.decode() if value is not None else None for value in values]
        return [None if text is None else (text[0] == "+", text[1:]) for text in texts]

    async def drop_results(self, batch_id: str) -> None:
        """They stand in files now."""
        await self._redis.delete(self._shelves.parts(batch_id))


def _batch(batch_id: str, row: dict[bytes, bytes]) -> StoredBatch:
    fields = {name.decode(): value.decode() for name, value in row.items()}
    return StoredBatch(
        batch_id=batch_id,
        tenant=fields.pop("tenant"),
        state=fields.pop("state"),
        about=json.loads(fields.pop("about")),
        fields=fields,
    )
