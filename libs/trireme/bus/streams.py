"""Typed Redis streams: one protobuf message type per stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Container, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import DecodeError, Message
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from trireme.bus.connection import AWAY

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

FACT = b"f"
"""The one field of a stream entry."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[M]):
    """One fact and its place in the stream."""

    entry_id: bytes
    fact: M


class Stream(Generic[M]):
    """One stream, for publishing, for tailing and for a consumer group."""

    def __init__(self, redis: Redis, key: str, fact_type: type[M], *, max_entries: int | None = None) -> None:
        self.key = key
        self._redis = redis
        self._fact_type = fact_type
        self._max_entries = max_entries

    async def publish(self, fact: M, *, via: Any = None) -> None:
        """Append a fact; trims to about `max_entries`. `via` may be a pipeline."""
        await (via or self._redis).xadd(
            self.key, {FACT: fact.SerializeToString()}, maxlen=self._max_entries, approximate=True
        )

    async def tail(self, *, after: bytes | str = "$", block_ms: int = 1000) -> AsyncIterator[Entry[M]]:
        """All facts appended from now on (or after an entry id), for ever, also across restarts of Redis."""
        last: bytes | str = after
        while True:
            try:
                if last == "$":
                    last = await self.last_id()
                found = await self._redis.xread({self.key: last}, count=512, block=block_ms)
            except AWAY:
                await asyncio.sleep(0.25)
                continue
            for entry_id, fact in self._decode(found):
                last = entry_id
                if fact is not None:
                    yield Entry(entry_id, fact)

    async def last_id(self) -> bytes:
        """The id of the newest entry, or the stream's beginning."""
        newest = await self._redis.xrevrange(self.key, count=1)
        return cast(bytes, newest[0][0]) if newest else b"0-0"

    async def create_group(self, group: str) -> None:
        """Make the consumer group, from the stream's beginning, unless it is there."""
        try:
            await self._redis.xgroup_create(self.key, group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def read_group(
        self, group: str, consumer: str, *, count: int, block_ms: int | None
    ) -> list[Entry[M]]:
        """New facts for this consumer; recreates a group that was lost. Empty while Redis is away."""
        try:
            try:
                found = await self._redis.xreadgroup(
                    group, consumer, {self.key: ">"}, count=count, block=block_ms
                )
            except ResponseError as error:
                # The stream was deleted: before the command, or while it waited.
                if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
                    raise
                await self.create_group(group)
                return []
            return await self._readable(group, self._decode(found))
        except AWAY:
            await asyncio.sleep(0.1)
            return []

    async def claim(self, group: str, consumer: str, *, idle_ms: int, count: int = 256) -> list[Entry[M]]:
        """Facts that another consumer read and held for longer than `idle_ms` without acknowledging."""
        try:
            reply = await self._redis.xautoclaim(
                self.key, group, consumer, min_idle_time=idle_ms, start_id="0-0", count=count
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return []
        return await self._readable(group, self._decode([(self.key, reply[1])]))

    async def forgotten(
        self, group: str, consumer: str, *, held: Container[bytes], idle_ms: int
    ) -> list[Entry[M]]:
        """Facts that count as read by this consumer, longer ago than `idle_ms`, and are not in `held`.

        Where the connection breaks after a read and before its reply, the server counts the facts
        as read, and nobody has them.
        """
        lost: list[bytes] = []
        start = "-"
        while True:
            try:
                pending = await self._redis.xpending_range(
                    self.key, group, min=start, max="+", count=512, consumername=consumer, idle=idle_ms
                )
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                return []
            ids = [cast(bytes, row["message_id"]) for row in pending]
            lost.extend(entry_id for entry_id in ids if entry_id not in held)
            if len(ids) < 512:
                break
            start = f"({ids[-1].decode()}"
        return await self._claim(group, consumer, lost)

    async def take_from(self, group: str, consumer: str, *, dead_consumer: str) -> list[Entry[M]]:
        """All facts that `dead_consumer` held; it is removed from the group once it holds none."""
        taken: list[Entry[M]] = []
        while True:
            pending = await self._redis.xpending_range(
                self.key, group, min="-", max="+", count=512, consumername=dead_consumer
            )
            if not pending:
                await self._redis.xgroup_delconsumer(self.key, group, dead_consumer)
                return taken
            ids = [cast(bytes, row["message_id"]) for row in pending]
            taken.extend(await self._claim(group, consumer, ids))

    async def _claim(self, group: str, consumer: str, ids: Sequence[bytes]) -> list[Entry[M]]:
        """Make this consumer the holder of these facts; those that were deleted are acknowledged."""
        if not ids:
            return []
        rows = await self._redis.xclaim(self.key, group, consumer, min_idle_time=0, message_ids=list(ids))
        decoded = self._decode([(self.key, rows)])
        await self.acknowledge(group, sorted(set(ids) - {entry_id for entry_id, _ in decoded}))
        return await self._readable(group, decoded)

    async def _readable(self, group: str, decoded: list[tuple[bytes, M | None]]) -> list[Entry[M]]:
        """What could be decoded; the rest is acknowledged, or it would be held for ever."""
        await self.acknowledge(group, [entry_id for entry_id, fact in decoded if fact is None], delete=True)
        return [Entry(entry_id, fact) for entry_id, fact in decoded if fact is not None]

    async def acknowledge(self, group: str, entry_ids: Sequence[bytes], *, delete: bool = False) -> None:
        """Say that the facts' effects are durable; `delete` also frees the entries."""
        if not entry_ids:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xack(self.key, group, *entry_ids)
            if delete:
                pipe.xdel(self.key, *entry_ids)
            await pipe.execute()

    async def unread(self, group: str) -> int:
        """Entries that no consumer of the group has read."""
        entries = await self._redis.xlen(self.key)
        pending = await self._redis.xpending(self.key, group)
        return max(0, int(entries) - int(pending["pending"]))

    async def everything(self) -> list[Entry[M]]:
        """All entries now in the stream."""
        rows = self._decode([(self.key, await self._redis.xrange(self.key))])
        return [Entry(entry_id, fact) for entry_id, fact in rows if fact is not None]

    def _decode(self, found: Any) -> list[tuple[bytes, M | None]]:
        """Entries with their facts, None where the bytes are no such fact; deleted ones are left out."""
        decoded: list[tuple[bytes, M | None]] = []
        for _, rows in found.items() if isinstance(found, dict) else found or ():
            flat = rows[0] if rows and isinstance(rows[0], list) else rows
            for entry_id, fields in flat:
                if entry_id is None or not fields:
                    continue
                fact = self._fact_type()
                try:
                    fact.ParseFromString(fields.get(FACT, b""))
                except DecodeError:
                    log.error("unreadable_fact", extra={"stream": self.key, "entry": entry_id.decode()})
                    decoded.append((entry_id, None))
                else:
                    decoded.append((entry_id, fact))
        return decoded
