"""Builders for tests of the KV store: a clock moved by hand, a store in a folder, blocks by number."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from trireme.kvcache.arena import Arena, own_arena
from trireme.kvcache.arena_copies import CopyFault, copy_in, copy_out
from trireme.kvcache.block_codec import namespace_digest, payload_checksum, read_generation
from trireme.kvcache.residency_index import ResidencyReader
from trireme.kvcache.saves import NewBlock
from trireme.kvcache.segment_files import DiskCalls, SegmentFiles
from trireme.kvcache.stored_blocks import Block
from trireme.kvcache.tiered_store import Limits, TieredStore
from trireme.policies.kv_items import State
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


def slot_of(block: Block, store: TieredStore) -> AcquiredBlock:
    """What the servicer would send."""
    return AcquiredBlock(
        offset=store.dram.payload_offset(block),
        payload_bytes=block.payload_bytes,
        checksum=block.checksum,
        generation=block.generation,
    )


@asynccontextmanager
async def opened_store(
    directory: Path,
    *,
    dram_bytes: int,
    ssd_bytes: int = 0,
    clock: HandClock | None = None,
    limits: Limits | None = None,
    calls: DiskCalls | None = None,
) -> AsyncIterator[TieredStore]:
    """A store whose arena and segments lie in `directory`; nothing runs behind it."""
    clock = clock or HandClock()
    with own_arena(directory, dram_bytes=dram_bytes, ssd_bytes=ssd_bytes) as arena:
        files = SegmentFiles(directory / "ssd", calls=calls) if ssd_bytes else None
        opened = TieredStore.opened(arena, files, ssd_bytes=ssd_bytes, clock=clock, limits=limits)
        async with opened as store:
            yield store


def save(
    store: TieredStore, blocks: Iterable[tuple[int, bytes]], *, namespace: str = NAMESPACE, tenant: str = "t"
) -> int:
    """Reserve, copy and commit as a worker does; returns how many were committed."""
    blocks = list(blocks)
    wanted = [NewBlock(block_hash=block_hash(number), payload_bytes=len(data)) for number, data in blocks]
    generations, checksums = [], []
    for outcome, (_, data) in zip(store.saves.reserve(namespace, tenant, wanted), blocks, strict=True):
        if isinstance(outcome, Block):
            write(store.arena, store, outcome, data)
            generations.append(outcome.generation)
            checksums.append(payload_checksum(data))
    return store.saves.commit(generations, checksums)


def write(arena: Arena, store: TieredStore, block: Block, data: bytes) -> None:
    """Copy a payload to reserved room."""
    room = ReservedBlock(offset=store.dram.payload_offset(block), generation=block.generation)
    assert copy_in(arena, room, data) is None


async def load(
    store: TieredStore, numbers: Iterable[int], *, namespace: str = NAMESPACE, deadline_s: float = 60.0
) -> list[bytes]:
    """Acquire, copy and release as a worker does; the payloads up to the first miss."""
    hashes = b"".join(map(block_hash, numbers))
    acquired = await store.acquire(namespace, hashes, deadline_s=deadline_s, lease_s=5.0)
    payloads, corrupt = [], []
    for block in acquired.blocks:
        copied = copy_out(store.arena, slot_of(block, store))
        if isinstance(copied, CopyFault):
            corrupt.append(block.generation)
            break
        payloads.append(copied)
    store.release(acquired.lease_id, corrupt_generations=corrupt)
    return payloads


def bytes_on_disk(directory: Path) -> int:
    """Bytes of segment files, some of which may be deleted at this moment."""
    total = 0
    for path in directory.glob("segment-*.kv"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


async def until_settled(store: TieredStore) -> None:
    """Plan and move until there is nothing left to do."""
    while store.look_ahead.replan() or store.look_ahead.is_busy:
        await store.look_ahead.settle()


def agree(store: TieredStore, *, generations: bool = True) -> None:
    """Every book of the store says the same of each block; raises AssertionError where one does not."""
    table, reader = store.table, ResidencyReader(store.arena.index)
    dram_bytes: Counter[str] = Counter()
    ssd_bytes: Counter[str] = Counter()
    blocks = 0
    for run in table.runs.values():
        assert run.blocks and run.size_bytes == sum(block.image_bytes for block in run.blocks)
        assert run.in_dram or run.on_ssd or run.state is not State.RESIDENT
        item = table.index.get(run.number)
        assert item is not None
        told = (item.size_bytes, item.in_dram, item.on_ssd, item.state, item.pinned)
        assert told == (run.size_bytes, run.in_dram, run.on_ssd, run.state, run.pins > 0)
        for block in run.blocks:
            blocks += 1
            assert table.blocks[block.key] is block and block.run is run
            digest, name = block.key[:16], block.key[16:]
            assert digest == namespace_digest(NAMESPACE)
            if not store.residency.left_out:
                assert reader.match(NAMESPACE, name) == (int(run.in_dram or run.on_ssd), int(run.in_dram))
            if run.in_dram and generations:
                assert read_generation(store.dram.image(block)) == block.generation
        if run.in_dram:
            dram_bytes[run.tenant] += run.size_bytes
        if run.on_ssd:
            ssd_bytes[run.tenant] += run.size_bytes
            assert store.ssd is not None and store.ssd.segments.by_number[run.segment].runs[run.number] is run
    assert blocks == len(table.blocks) and len(table.runs) == len(table.index)
    assert ssd_bytes == table.ssd_ledger.bytes
    assert table.index.ssd_bytes >= sum(ssd_bytes.values())
    reserved = store.dram.used_bytes - sum(dram_bytes.values())
    assert reserved >= 0
    if store.ssd is not None:
        assert store.ssd.segments.live_bytes == sum(ssd_bytes.values())
