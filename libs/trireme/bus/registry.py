"""Who is alive: each process renews a lease on its record; a lease that ends is a death."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from trireme.bus.connection import AWAY, Keys
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

log = logging.getLogger(__name__)

LEASE_S = 3.0
"""A process whose lease was not renewed for so long is taken for dead."""
RENEW_S = 0.5


def new_process_id(service: str) -> str:
    """Unique per process start."""
    return f"{service}-{secrets.token_hex(4)}"


@functools.cache
def code_version() -> str:
    """Of the installed distribution; empty where the code was not installed."""
    try:
        return importlib.metadata.version("trireme")
    except importlib.metadata.PackageNotFoundError:
        return ""


class LeaseLost(Exception):
    """The lease ended while the process lived: others have taken over its work."""


class Registry:
    """The registry of one fleet."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def put(self, record: ProcessRecord, *, only_if_held: bool = False) -> bool:
        """Write the record and renew its lease; False where `only_if_held` and it had ended."""
        now_s = time.time()
        record.version = record.version or code_version()
        held = await self._redis.set(
            self._keys.process(record.id),
            record.SerializeToString(),
            px=int(LEASE_S * 1000),
            xx=only_if_held,
        )
        if not held:
            return False
        await self._redis.zadd(self._keys.processes, {record.id: now_s + LEASE_S})
        return True

    async def remove(self, process_id: str) -> None:
        """Leave at once, as a process does that ends in order."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.process(process_id))
            pipe.zrem(self._keys.processes, process_id)
            await pipe.execute()

    async def living(self, service: str | None = None) -> list[ProcessRecord]:
        """The records of all processes whose lease holds, of one service or of all, by id."""
        ids = cast(list[bytes], await self._redis.zrange(self._keys.processes, 0, -1))
        if not ids:
            return []
        names = [self._keys.process(name.decode()) for name in ids]
        values = cast(list[bytes | None], await self._redis.mget(names))
        gone = [name for name, value in zip(ids, values, strict=True) if value is None]
        if gone:
            # Who is alive can be read also while Redis takes no writes.
            with contextlib.suppress(*AWAY, ResponseError):
                await self._redis.zrem(self._keys.processes, *gone)
        records = [ProcessRecord.FromString(value) for value in values if value is not None]
        return sorted((r for r in records if service in (None, r.service)), key=lambda r: r.id)

    @asynccontextmanager
    async def membership(
        self, describe: Callable[[], ProcessRecord | None], *, on_lost: Callable[[], None] | None = None
    ) -> AsyncIterator[None]:
        """Stay registered while the block runs.

        `describe` returns the present record, or None to let the lease run out (no progress).
        `on_lost` is called once if the lease ended while the process lived and Redis answered:
        a worker must then drop its work, since others have taken it over. A renewal that fails for
        another reason than an absence of Redis ends the block with its error.
        """
        record = describe()
        if record is None:
            raise ValueError("a process registers with a record")
        await self.put(record)
        block = asyncio.current_task()
        assert block is not None
        renewer = asyncio.create_task(self._renew(describe, on_lost))

        def end_block(renewer: asyncio.Task[None]) -> None:
            # A process that only seems to be a member would compute what others have taken over.
            if not renewer.cancelled() and renewer.exception() is not None:
                block.cancel()

        renewer.add_done_callback(end_block)
        try:
            yield
        except asyncio.CancelledError:
            if renewer.done() and not renewer.cancelled() and (error := renewer.exception()) is not None:
                raise error from None
            raise
        finally:
            renewer.remove_done_callback(end_block)
            while not renewer.done():
                renewer.cancel()
                await asyncio.wait([renewer], timeout=0.2)
            try:
                await self.remove(record.id)
            except AWAY:
                log.warning("left_without_redis", extra={"process_id": record.id})

    async def _renew(
        self, describe: Callable[[], ProcessRecord | None], on_lost: Callable[[], None] | None
    ) -> None:
        away = False
        while True:
            await asyncio.sleep(RENEW_S)
            record = describe()
            if record is None:
                continue
            asked_s = time.monotonic()
            try:
                # After an absence of Redis the lease may have ended without anyone seeing it.
                held = await self.put(record, only_if_held=on_lost is not None and not away)
                if not held and time.monotonic() - asked_s > RENEW_S:
                    held = await self.put(record)  # it was Redis that hung
                away = False
            except AWAY:
                away = True
                continue
            if not held and on_lost is not None:
                on_lost()
                return
