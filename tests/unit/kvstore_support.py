"""Builders for tests of the KV store: a clock moved by hand, a store in a folder, blocks by number."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from trireme.kvcache.arena import Arena, own_arena
from trireme.kvcache.arena_copies import CopyFault, copy_in, copy_out
from trireme.kvcache.block_codec import payload_checksum
from trireme.kvcache.dram_tier import Slot
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.ssd_tier import SsdTier
from trireme.kvcache.tiered_store import NewBlock, TieredStore
from trireme.wire.kvstore.v1.kvstore_pb2 import AcquiredBlock, ReservedBlock

NAMESPACE = "model-a/float32/v1"


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def unix_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s


def block_hash(number: int) -> bytes:
    """A 16-byte name."""
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def payload(number: int, length: int = 3900) -> bytes:
    """Bytes that belong to a block's number alone."""
    return random.Random(number).randbytes(length)


def slot_of(slot: Slot, store: TieredStore) -> AcquiredBlock:
    """What the servicer would send."""
    return AcquiredBlock(
        offset=store.dram.payload_offset(slot),
        payload_bytes=slot.header.payload_bytes,
        checksum=slot.header.checksum,
        generation=slot.generation,
    )


@asynccontextmanager
async def opened_store(
    directory: Path, *, dram_bytes: int, ssd_bytes: int = 0, clock: HandClock | None = None, **files: object
) -> AsyncIterator[TieredStore]:
    """A store whose arena and segments lie in `directory`; nothing runs behind it."""
    clock = clock or HandClock()
    with own_arena(directory, dram_bytes=dram_bytes) as arena:
        if not ssd_bytes:
            yield TieredStore(arena, None, clock=clock)
            return
        segments = SegmentFiles(directory / "ssd", quota_bytes=ssd_bytes, **files)  # type: ignore[arg-type]
        async with SsdTier.opened(segments, clock=clock, queue_bytes=dram_bytes) as ssd:
            yield TieredStore(arena, ssd, clock=clock)


def save(
    store: TieredStore, blocks: Iterable[tuple[int, bytes]], *, namespace: str = NAMESPACE, tenant: str = "t"
) -> int:
    """Reserve, copy and commit as a worker does; returns how many were committed."""
    blocks = list(blocks)
    wanted = [
        NewBlock(block_hash=block_hash(number), payload_bytes=len(data), checksum=payload_checksum(data))
        for number, data in blocks
    ]
    generations = []
    for outcome, (_, data) in zip(store.reserve(namespace, tenant, wanted), blocks, strict=True):
        if isinstance(outcome, Slot):
            write(store.arena, store, outcome, data)
            generations.append(outcome.generation)
    return store.commit(generations)


def write(arena: Arena, store: TieredStore, slot: Slot, data: bytes) -> None:
    """Copy a payload to reserved room."""
    room = ReservedBlock(offset=store.dram.payload_offset(slot), generation=slot.generation)
    assert copy_in(arena, room, data) is None


async def load(
    store: TieredStore, numbers: Iterable[int], *, namespace: str = NAMESPACE, deadline_s: float = 10.0
) -> list[bytes]:
    """Acquire, copy and release as a worker does; the payloads up to the first miss."""
    hashes = b"".join(map(block_hash, numbers))
    acquired = await store.acquire(namespace, hashes, deadline_s=deadline_s, lease_s=5.0)
    payloads, corrupt = [], []
    for slot in acquired.slots:
        copied = copy_out(store.arena, slot_of(slot, store))
        if isinstance(copied, CopyFault):
            corrupt.append(slot.generation)
            break
        payloads.append(copied)
    store.release(acquired.lease_id, corrupt_generations=corrupt)
    return payloads
