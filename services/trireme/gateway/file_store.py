"""Files that clients upload and batches write: in Redis, in pieces, within bounds.

Redis, since every gateway must see them, it is what makes requests durable anyway, and a volume
that many pods write is what few clusters have. So files are small: see `max_file_bytes`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.errors import ObjectNotFound, Overloaded, StorageFull
from trireme.gateway.shelves import FULL_RETRY_S, Evict, Put, ShelfLimits, Shelves

PIECE_BYTES = 2**20
"""A file's pieces have at most so many bytes; one command moves one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file's card."""

    file_id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int

    def shown(self) -> dict[str, Any]:
        """As OpenAI's API shows it."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """The files of one fleet."""

    def __init__(self, redis: Redis, keys: Keys, limits: ShelfLimits) -> None:
        self._redis = redis
        self._shelves = Shelves(redis, keys, kind="file", limits=limits)

    @property
    def ttl_s(self) -> int:
        """How long a file is kept, unless its owner says less."""
        return self._shelves.ttl_s

    async def write(self, file_id: str, data: bytes | Iterable[bytes], *, anew: bool = False) -> int:
        """Add to a file that has no card yet, so that nobody sees half of it; its bytes so far."""
        pieces = _pieces(data) if isinstance(data, bytes) else data
        parts = self._shelves.parts(file_id)
        if anew:
            await self._redis.delete(parts)
        num_bytes = 0
        for piece in pieces:
            await self._redis.rpush(parts, piece)
            await self._redis.expire(parts, self.ttl_s)
            num_bytes += len(piece)
        return num_bytes

    async def publish(self, file: StoredFile, *, bounded: bool = True) -> None:
        """Give a file its card; `bounded`: only while its tenant's shelf has room.

        Raises:
            StorageFull: it has not; the file is gone.
            Overloaded: the fleet's has not; the file is gone.
        """
        fields = {
            "tenant": file.tenant,
            "open": "0",
            "filename": file.filename,
            "purpose": file.purpose,
            "bytes": str(file.num_bytes),
            "created_at": str(file.created_at),
            "expires_at": str(file.expires_at),
        }
        ttl_s = max(1, file.expires_at - int(time.time()))
        outcome = await self._shelves.put(
            file.file_id,
            file.tenant,
            fields,
            size=file.num_bytes,
            evict=Evict.NOTHING if bounded else Evict.UNBOUNDED,
            ttl_s=ttl_s,
        )
        limits = self._shelves.limits
        if outcome in (Put.FULL, Put.FLEET_FULL):
            await self._redis.delete(self._shelves.parts(file.file_id))
        if outcome is Put.FLEET_FULL:
            raise Overloaded(
                f"the files of all tenants may be {limits.fleet_count} and have {limits.fleet_bytes} bytes, "
                "and this one does not fit: come back when some have expired",
                retry_after_s=FULL_RETRY_S,
            )
        if outcome is Put.FULL:
            raise StorageFull(
                f"a tenant's files may be {limits.max_count} and have {limits.max_bytes} bytes: delete some"
            )
        await self._redis.expire(self._shelves.parts(file.file_id), ttl_s)

    async def load(self, file_id: str, tenant: str) -> StoredFile:
        """A file's card.

        Raises:
            ObjectNotFound: there is none of that id, or it is another tenant's.
        """
        found = await self.load_all([file_id], tenant)
        if not found:
            raise ObjectNotFound(f"no file {file_id[:80]!r} here", param="file_id")
        return found[0]

    async def load_all(self, file_ids: Iterable[str], tenant: str) -> list[StoredFile]:
        """The cards of those that are there and the tenant's."""
        named = list(file_ids)
        async with self._redis.pipeline(transaction=False) as pipe:
            for file_id in named:
                pipe.hgetall(self._shelves.object(file_id))
            rows = cast(list[dict[bytes, bytes]], await pipe.execute())
        files = [_file(file_id, row) for file_id, row in zip(named, rows, strict=True) if row]
        return [file for file in files if file.tenant == tenant]

    async def ids(self, tenant: str) -> list[str]:
        """A tenant's files, oldest first."""
        return await self._shelves.ids(tenant)

    async def read(self, file_id: str) -> AsyncIterator[bytes]:
        """A file's pieces."""
        parts = self._shelves.parts(file_id)
        place = 0
        while True:
            piece = cast(bytes | None, await self._redis.lindex(parts, place))
            if piece is None:
                return
            yield piece
            place += 1

    async def delete(self, file_id: str, tenant: str) -> None:
        """Forget a file."""
        await self._shelves.drop(file_id, tenant)


def _pieces(data: bytes) -> Iterable[bytes]:
    return (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _file(file_id: str, row: dict[bytes, bytes]) -> StoredFile:
    return StoredFile(
        file_id=file_id,
        tenant=row[b"tenant"].decode(),
        filename=row[b"filename"].decode(),
        purpose=row[b"purpose"].decode(),
        num_bytes=int(row[b"bytes"]),
        created_at=int(row[b"created_at"]),
        expires_at=int(row[b"expires_at"]),
    )
