"""Segment files: what is read is what was written; damage, a full, broken or hanging disk are misses."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvstore_support import (
    NAMESPACE,
    HandClock,
    agree,
    block_hash,
    bytes_on_disk,
    load,
    opened_store,
    payload,
    save,
    until_settled,
)
from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    BlockHeader,
    BlockKey,
    block_key,
    image_bytes,
    payload_checksum,
    payload_of,
    write_header,
)
from trireme.kvcache.segment_files import DiskCalls, FoundSegment, SegmentFiles
from trireme.kvcache.segment_sidecar import FoundBlock, FoundRun, decode_sidecar, encode_sidecar
from trireme.kvcache.tiered_store import TieredStore

MIB = 2**20


def key(number: int) -> BlockKey:
    return block_key(b"n" * 16, block_hash(number))


def image(number: int, length: int = 3900, *, position: int = 0) -> memoryview:
    """A block's image in memory that direct I/O accepts."""
    data = payload(number, length)
    header = BlockHeader(
        key=key(number),
        payload_bytes=length,
        checksum=payload_checksum(data),
        tenant="t",
        saved_unix_s=1.0,
        position=position,
    )
    made = memoryview(mmap.mmap(-1, image_bytes(length)))
    write_header(made, header, generation=5)
    made[HEADER_BYTES : HEADER_BYTES + length] = data
    return made


def write(directory: Path, images: Sequence[memoryview], *, calls: DiskCalls | None = None) -> None:
    """One unsealed segment with these images, as a crash leaves it."""
    files = SegmentFiles(directory, calls=calls)
    files.open()
    descriptor = files.create(1)
    files.write(descriptor, images, 0)
    files.close([descriptor])


def found_in(directory: Path) -> list[FoundSegment]:
    files = SegmentFiles(directory)
    found = files.open()
    files.close([segment.descriptor for segment in found])
    return found


def read(directory: Path, number: int) -> bytes | None:
    """A block's payload by way of a fresh start."""
    files = SegmentFiles(directory)
    segments = files.open()
    data: bytes | None = None
    for segment in segments:
        for block in (block for run in segment.runs for block in run.blocks if block.key == key(number)):
            into = memoryview(mmap.mmap(-1, image_bytes(block.payload_bytes)))
            if files.read(segment.descriptor, [(block.key, block.offset, into)]) == [True]:
                data = bytes(payload_of(into, block.payload_bytes))
    files.close([segment.descriptor for segment in segments])
    return data


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.kv"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_an_unsealed_segment_is_found_again_run_by_run(tmp_path: Path) -> None:
    sizes = [1000, 9000, 60_000, 4096, 100]
    write(tmp_path, [image(n, size, position=n % 3) for n, size in enumerate(sizes)])
    (segment,) = found_in(tmp_path)
    assert not segment.is_sealed
    assert [[block.key for block in run.blocks] for run in segment.runs] == [
        [key(0), key(1), key(2)],
        [key(3), key(4)],
    ]
    assert [read(tmp_path, n) for n in range(5)] == [payload(n, size) for n, size in enumerate(sizes)]


def test_behind_a_damaged_header_the_next_blocks_are_found(tmp_path: Path) -> None:
    write(tmp_path, [image(n, 10_000) for n in range(3)])
    flip(segments(tmp_path)[0], image_bytes(10_000) + 20)
    assert [read(tmp_path, n) for n in range(3)] == [payload(0, 10_000), None, payload(2, 10_000)]


@pytest.mark.parametrize("cut", [1, 4096, 8192 - HEADER_BYTES, 8191, 8192])
def test_a_truncated_segment_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    write(tmp_path, [image(n, 7000) for n in range(3)])
    last = segments(tmp_path)[0]
    os.truncate(last, last.stat().st_size - cut)
    assert [read(tmp_path, n) for n in range(3)] == [payload(0, 7000), payload(1, 7000), None]


@settings(max_examples=25, deadline=None)
@given(page=st.integers(0, 5), torn=st.sampled_from(["zeros", "older"]))
def test_a_write_torn_at_any_page_loses_its_block_alone(
    tmp_path_factory: pytest.TempPathFactory, page: int, torn: str
) -> None:
    # Power fails while two blocks of three pages each are written over what lay there before.
    directory = tmp_path_factory.mktemp("torn")
    write(directory, [image(n, 9000) for n in range(2)])
    path = segments(directory)[0]
    before = bytes(4096) if torn == "zeros" else bytes(image(77, 3900))
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(before)
    hit = page // 3
    assert [read(directory, n) for n in range(2)] == [
        None if n == hit else payload(n, 9000) for n in range(2)
    ]


RUNS = st.lists(
    st.builds(
        FoundRun,
        st.sampled_from(["", "acme", "ü"]),
        st.floats(0, 2e9),
        st.floats(0, 2e9),
        st.lists(
            st.builds(
                FoundBlock,
                st.binary(min_size=32, max_size=32).map(BlockKey),
                st.integers(1, 2**32),
                st.integers(0, 2**64 - 1),
                st.integers(0, 2**40),
            ),
            max_size=4,
        ),
    ),
    max_size=5,
)


@given(runs=RUNS, flip_at=st.integers(0, 10**6))
def test_a_sidecar_says_what_it_was_told_and_damage_shows(runs: list[FoundRun], flip_at: int) -> None:
    data = bytearray(encode_sidecar(runs, segment_bytes=4096))
    assert decode_sidecar(bytes(data), segment_bytes=4096) == runs
    assert decode_sidecar(bytes(data), segment_bytes=8192) is None
    assert decode_sidecar(bytes(data[:-1]), segment_bytes=4096) is None
    data[flip_at % len(data)] ^= 1 << flip_at % 8
    assert decode_sidecar(bytes(data), segment_bytes=4096) is None


def test_keys_that_end_in_zero_bytes_survive_the_sidecar() -> None:
    block = FoundBlock(BlockKey(b"k" * 30 + b"\0\0"), 10, 1, 0)
    runs = [FoundRun("t", 1.0, 2.0, [block])]
    assert decode_sidecar(encode_sidecar(runs, segment_bytes=4096), segment_bytes=4096) == runs


def test_two_stores_do_not_share_a_directory(tmp_path: Path) -> None:
    first = SegmentFiles(tmp_path)
    first.open()
    with pytest.raises(OSError, match="another store"):
        SegmentFiles(tmp_path).open()
    first.close([])
    SegmentFiles(tmp_path).open()


class Disk:
    """The calls of a disk that fails as it is told."""

    def __init__(self) -> None:
        self.room_bytes = 10**9
        self.fault = errno.ENOSPC
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.waiting = threading.Event()

    @property
    def calls(self) -> DiskCalls:
        return DiskCalls(pwritev=self.pwritev, preadv=self.preadv)

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._hang()
        length = sum(map(len, buffers))
        if self.room_bytes < length:
            raise OSError(self.fault, os.strerror(self.fault))
        self.room_bytes -= length
        return os.pwritev(descriptor, buffers, offset)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._hang()
        return os.preadv(descriptor, buffers, offset)

    def _hang(self) -> None:
        self.waiting.set()
        self.goes_on.wait(timeout=60)
        self.waiting.clear()


async def saved_on_ssd(store: TieredStore, numbers: range) -> int:
    """Save blocks one by one and write them; how many are on SSD."""
    for number in numbers:
        save(store, [(number, payload(number))])
    await store.flush(deadline_s=60.0)
    return sum(run.on_ssd for run in store.table.runs.values())


async def test_a_full_disk_stops_the_writing_and_not_the_reading(tmp_path: Path) -> None:
    disk, clock = Disk(), HandClock()
    disk.room_bytes = 10_000
    async with opened_store(
        tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB, clock=clock, calls=disk.calls
    ) as store:
        assert store.ssd is not None
        assert await saved_on_ssd(store, range(4)) == 2
        assert store.ssd.serving and "No space left" in store.ssd.status
        # What is on SSD alone is read; what is not stays in DRAM.
        for run in [run for run in store.table.runs.values() if run.on_ssd]:
            store.evictions.evict(run)
        assert [await load(store, [n]) for n in range(4)] == [[payload(n)] for n in range(4)]
        assert store.moved.promoted == 2
        agree(store)
        disk.room_bytes = 10**9
        clock.now_s += 30.0
        await store.ssd.check()
        assert store.ssd.status == ""
        assert await saved_on_ssd(store, range(4)) == 4
        agree(store)


async def test_a_broken_disk_turns_the_tier_off_until_it_works_again(tmp_path: Path) -> None:
    disk, clock = Disk(), HandClock()
    disk.room_bytes, disk.fault = 4096, errno.EIO
    async with opened_store(
        tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB, clock=clock, calls=disk.calls
    ) as store:
        assert store.ssd is not None
        assert await saved_on_ssd(store, range(2)) == 1
        assert not store.ssd.serving and "off" in store.ssd.status and not store.arena.is_ssd_on
        (run,) = [run for run in store.table.runs.values() if run.on_ssd]
        number = next(n for n in range(2) if store.table.blocks[run.blocks[0].key].key[16:] == block_hash(n))
        store.evictions.evict(run)
        assert store.match(NAMESPACE, block_hash(number)) == (0, 0)
        assert await load(store, [number]) == []
        await store.ssd.check()
        assert not store.ssd.serving, "too early to try again"
        clock.now_s += 30.0
        await store.ssd.check()
        assert store.ssd.serving and store.arena.is_ssd_on
        assert await load(store, [number]) == [payload(number)]
        agree(store)


async def test_a_vanished_directory_turns_the_tier_off_and_a_new_one_on(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB, clock=clock) as store:
        assert store.ssd is not None
        assert await saved_on_ssd(store, range(2)) == 2
        for run in list(store.table.runs.values())[:1]:
            store.evictions.evict(run)
        shutil.rmtree(tmp_path / "ssd")
        await store.ssd.check()
        assert not store.ssd.serving and "ssd tier is off" in store.ssd.status
        clock.now_s += 30.0
        await store.ssd.check()
        assert store.ssd.serving
        assert len(store.table.blocks) == 1, "what was on SSD alone is forgotten"
        agree(store)
        assert await saved_on_ssd(store, range(2)) == 2
        agree(store)


async def test_a_disk_that_hangs_costs_its_readers_their_deadline_and_nobody_else_anything(
    tmp_path: Path,
) -> None:
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        assert await saved_on_ssd(store, range(3)) == 3
    disk, clock = Disk(), HandClock()
    async with opened_store(
        tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB, clock=clock, calls=disk.calls
    ) as store:
        assert store.ssd is not None
        disk.goes_on.clear()
        save(store, [(9, payload(9))])
        assert await load(store, [0], deadline_s=0.01) == [], "a miss, by the caller's deadline"
        writing = store.evictions.write(next(run for run in store.table.runs.values() if run.in_dram))
        await asyncio.to_thread(disk.waiting.wait, 60)
        clock.now_s += 5.0
        store.ssd.watch()
        assert not store.ssd.serving and "has not answered" in store.ssd.status and store.ssd.hangs == 1
        # From now on nobody waits for the disk at all, DRAM serves, and health is not touched.
        reader = asyncio.create_task(load(store, [0], deadline_s=60.0))
        done, _ = await asyncio.wait({reader}, timeout=60.0)
        assert done and reader.result() == []
        assert await load(store, [9]) == [payload(9)]
        # The threads still sit in their calls: the slots they may write to are nobody else's.
        held_bytes = store.dram.used_bytes
        assert held_bytes == 2 * 4096
        clock.now_s += 30.0
        await store.ssd.check()
        assert not store.ssd.serving, "not before the disk has answered"
        disk.goes_on.set()
        assert writing is not None
        await asyncio.wait({writing})
        await store.look_ahead.settle()
        await store.ssd.check()
        assert store.ssd.serving
        assert [await load(store, [n]) for n in (0, 1, 2, 9)] == [[payload(n)] for n in (0, 1, 2, 9)]
        agree(store)


async def test_a_store_ends_while_its_disk_hangs(tmp_path: Path) -> None:
    disk = Disk()
    try:
        async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB, calls=disk.calls) as store:
            save(store, [(0, payload(0))])
            disk.goes_on.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(60.0):
                    await store.flush(deadline_s=0.05)
    finally:
        disk.goes_on.set()


async def test_a_flipped_byte_on_ssd_is_a_miss_and_the_block_can_be_saved_again(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        save(store, [(n, payload(n)) for n in range(4)])
        await store.flush(deadline_s=60.0)
    flip(segments(tmp_path / "ssd")[0], 4096 + HEADER_BYTES + 100)
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        assert await load(store, range(4)) == [payload(0)], "the block behind it is not lost"
        assert store.moved.ssd_corrupt == 1
        assert store.match(NAMESPACE, block_hash(1)) == (0, 0)
        assert await load(store, [2, 3]) == [payload(2), payload(3)]
        assert save(store, [(1, payload(1))]) == 1
        assert await load(store, range(4)) == [payload(n) for n in range(4)]
        agree(store)


async def test_a_byte_flipped_in_dram_is_not_written_to_ssd(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        save(store, [(n, payload(n)) for n in range(3)])
        block = store.table.blocks[next(key for key in store.table.blocks if key[16:] == block_hash(1))]
        store.dram.payload(block)[7] ^= 1
        await store.flush(deadline_s=60.0)
        assert store.moved.dram_corrupt == 1
        assert store.match(NAMESPACE, b"".join(map(block_hash, range(3)))) == (1, 1)
        agree(store)
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        assert await load(store, range(3)) == [payload(0)]
        assert await load(store, [2]) == [payload(2)]


async def test_files_stay_within_the_quota_while_blocks_come_and_go(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=4 * MIB) as store:
        assert store.ssd is not None
        for number in range(0, 3000, 20):
            save(store, [(n, payload(n)) for n in range(number, number + 20)])
            await until_settled(store)
            await store.ssd.compact()
            assert bytes_on_disk(tmp_path / "ssd") <= 4 * MIB
            assert store.ssd.segments.used_bytes <= 4 * MIB
            assert await load(store, range(number, number + 20)) == [
                payload(n) for n in range(number, number + 20)
            ]
        agree(store)
        assert store.ssd.segments.live_bytes > MIB


async def test_half_empty_segments_are_moved_together(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=16 * MIB, ssd_bytes=4 * MIB) as store:
        assert store.ssd is not None
        for number in range(0, 704, 16):
            save(store, [(n, payload(n)) for n in range(number, number + 16)])
        await store.flush(deadline_s=60.0)
        runs = [run for run in store.table.runs.values() if run.on_ssd]
        for run in runs:
            store.evictions.drop(run, from_dram=True, from_ssd=False)
        for run in runs[1::3] + runs[2::3]:
            store.evictions.drop(run, from_dram=False, from_ssd=True)
        before = store.ssd.segments.used_bytes
        for _ in range(4):
            await store.ssd.compact()
        assert store.ssd.segments.used_bytes < 0.75 * before
        agree(store)
        kept = [block.key for run in runs[::3] for block in run.blocks]
        numbers = [n for n in range(704) if any(key[16:] == block_hash(n) for key in kept)]
        for start in range(0, len(numbers), 16):
            part = numbers[start : start + 16]
            assert await load(store, part) == [payload(n) for n in part]


async def test_a_restart_reads_sealed_indexes_and_scans_the_rest(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=8 * MIB, ssd_bytes=64 * MIB) as store:
        save(store, [(n, payload(n)) for n in range(600)])
        await store.flush(deadline_s=60.0)
    sidecars = sorted((tmp_path / "ssd").glob("*.index"))
    assert len(sidecars) == len(segments(tmp_path / "ssd")) == 3
    sidecars[0].unlink()
    flip(sidecars[1], 40)
    async with opened_store(tmp_path, dram_bytes=8 * MIB, ssd_bytes=64 * MIB) as store:
        assert len(store.table.blocks) == 600
        assert await load(store, range(600)) == [payload(n) for n in range(600)]
        agree(store)
