"""Segment files: what is read is what was written; damage, a full disk and a lost folder are misses."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvstore_support import HandClock, block_hash, payload
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
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.ssd_tier import SsdTier

MIB = 2**20


def key(number: int) -> BlockKey:
    return block_key(b"n" * 16, block_hash(number))


def image(number: int, length: int = 3900) -> bytearray:
    data = payload(number, length)
    header = BlockHeader(
        key=key(number), payload_bytes=length, checksum=payload_checksum(data), tenant="t", saved_unix_s=1.0
    )
    made = bytearray(image_bytes(length))
    write_header(made, header, generation=5)
    made[HEADER_BYTES : HEADER_BYTES + length] = data
    return made


def read(files: SegmentFiles, number: int) -> bytes | None:
    header = files.header(key(number))
    if header is None:
        return None
    into = bytearray(image_bytes(header.payload_bytes))
    if not files.read_into(key(number), memoryview(into)):
        return None
    return bytes(payload_of(into, header.payload_bytes))


@contextmanager
def opened(directory: Path, *, quota_bytes: int = 8 * MIB) -> Iterator[SegmentFiles]:
    files = SegmentFiles(directory, quota_bytes=quota_bytes)
    files.open()
    yield files
    files.close()


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*"))


def test_blocks_are_found_again_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        assert all(files.append(image(n, 1000 * n)) for n in range(1, 100))
    assert len(segments(tmp_path)) > 1
    with opened(tmp_path) as files:
        assert [read(files, n) for n in range(1, 100)] == [payload(n, 1000 * n) for n in range(1, 100)]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 700_000), min_size=1, max_size=40))
def test_files_never_exceed_the_quota_and_the_newest_block_is_always_there(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory, opened(Path(directory), quota_bytes=2 * MIB) as files:
        for number, size in enumerate(sizes):
            assert files.append(image(number, size))
            assert read(files, number) == payload(number, size)
            on_disk = sum(path.stat().st_size for path in segments(Path(directory)))
            assert on_disk == files.used_bytes <= 2 * MIB
        for number, size in enumerate(sizes):
            assert read(files, number) in (None, payload(number, size))


def test_the_segment_used_least_recently_goes_first(tmp_path: Path) -> None:
    with opened(tmp_path, quota_bytes=3 * MIB) as files:  # 3 segments of 256 blocks
        for number in range(768):
            files.append(image(number))
        assert read(files, 0) == payload(0)
        files.append(image(768))
        assert 0 in [n for n in range(769) if key(n) in files]
        assert [n for n in range(769) if key(n) not in files] == list(range(256, 512))


def test_a_flipped_payload_byte_is_a_miss_and_the_block_can_be_written_again(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        files.append(image(0))
        files.append(image(1))
    flip(segments(tmp_path)[0], HEADER_BYTES + 100)
    with opened(tmp_path) as files:
        assert read(files, 0) is None and files.corrupt == 1
        assert key(0) not in files
        assert read(files, 1) == payload(1)
        assert files.append(image(0))
        assert read(files, 0) == payload(0)
    with opened(tmp_path) as files:
        assert read(files, 0) == payload(0), "the sound copy is the one that is indexed"


def test_behind_a_damaged_header_the_next_blocks_are_found(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        for number in range(3):
            files.append(image(number, 10_000))
    flip(segments(tmp_path)[0], image_bytes(10_000) + 20)
    with opened(tmp_path) as files:
        assert [read(files, n) for n in range(3)] == [payload(0, 10_000), None, payload(2, 10_000)]


@pytest.mark.parametrize("cut", [1, 4096, 8192 - HEADER_BYTES, 8191, 8192])
def test_a_truncated_segment_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    with opened(tmp_path) as files:
        for number in range(3):
            files.append(image(number, 7000))
    last = segments(tmp_path)[0]
    os.truncate(last, last.stat().st_size - cut)
    with opened(tmp_path) as files:
        assert [read(files, n) for n in range(3)] == [payload(0, 7000), payload(1, 7000), None]


def test_truncation_while_it_is_open_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        files.append(image(0))
        os.truncate(segments(tmp_path)[0], 100)
        assert read(files, 0) is None and files.corrupt == 1


def test_a_corrupt_image_is_not_written(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        bad = image(0)
        bad[HEADER_BYTES] ^= 1
        assert not files.append(bad)
        assert files.used_bytes == 0


class SmallDisk:
    """Writes like os.pwrite until `room_bytes` are used up, the last write in part."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.fault = errno.ENOSPC

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if not self.room_bytes:
            raise OSError(self.fault, os.strerror(self.fault))
        count = os.pwrite(descriptor, data[: self.room_bytes], offset)
        self.room_bytes -= count
        return count


async def test_a_full_disk_stops_the_writing_and_not_the_reading(tmp_path: Path) -> None:
    disk, clock = SmallDisk(10_000), HandClock()
    files = SegmentFiles(tmp_path, quota_bytes=8 * MIB, pwrite=disk.pwrite)
    async with SsdTier.opened(files, clock=clock, queue_bytes=MIB) as ssd:
        written = [await ssd.write_through(memoryview(image(n))) for n in range(4)]
        assert written == [True, True, False, False]
        assert ssd.serving and "No space left" in ssd.status
        assert segments(tmp_path)[0].stat().st_size == files.used_bytes == 2 * 4096
        into = bytearray(4096)
        assert await ssd.read_into(key(1), memoryview(into))
        assert payload_of(into, 3900) == payload(1)

        ssd.offer(key(9), memoryview(image(9)))
        assert ssd.queue_blocks == 0 and ssd.dropped == 1

        disk.room_bytes = 10**9
        clock.now_s += 30.0
        await ssd.check()
        assert ssd.status == "" and await ssd.write_through(memoryview(image(2)))


async def test_a_broken_disk_turns_the_tier_off_until_it_works_again(tmp_path: Path) -> None:
    disk, clock = SmallDisk(4096), HandClock()
    disk.fault = errno.EIO
    files = SegmentFiles(tmp_path, quota_bytes=8 * MIB, pwrite=disk.pwrite)
    async with SsdTier.opened(files, clock=clock, queue_bytes=MIB) as ssd:
        assert await ssd.write_through(memoryview(image(0)))
        assert not await ssd.write_through(memoryview(image(1)))
        assert not ssd.serving and key(0) not in ssd and "off" in ssd.status
        await ssd.check()
        assert not ssd.serving, "too early to try again"
        clock.now_s += 30.0
        await ssd.check()
        assert ssd.serving and key(0) in ssd


async def test_a_vanished_directory_turns_the_tier_off_and_a_new_one_on(tmp_path: Path) -> None:
    clock = HandClock()
    files = SegmentFiles(tmp_path / "ssd", quota_bytes=8 * MIB)
    async with SsdTier.opened(files, clock=clock, queue_bytes=MIB) as ssd:
        assert await ssd.write_through(memoryview(image(0)))
        shutil.rmtree(tmp_path / "ssd")
        await ssd.check()
        assert not ssd.serving and "ssd tier is off" in ssd.status
        assert not await ssd.write_through(memoryview(image(1)))
        clock.now_s += 30.0
        await ssd.check()
        assert ssd.serving and key(0) not in ssd
        assert await ssd.write_through(memoryview(image(1)))


async def test_two_stores_do_not_share_a_directory(tmp_path: Path) -> None:
    clock = HandClock()
    with opened(tmp_path):
        second = SegmentFiles(tmp_path, quota_bytes=8 * MIB)
        async with SsdTier.opened(second, clock=clock, queue_bytes=MIB) as ssd:
            assert not ssd.serving and "another store" in ssd.status


async def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path, quota_bytes=8 * MIB)
    async with SsdTier.opened(files, clock=HandClock(), queue_bytes=3 * 4096) as ssd:
        for number in range(5):
            ssd.offer(key(number), memoryview(image(number)))
        assert (ssd.queue_blocks, ssd.queue_bytes, ssd.dropped) == (3, 3 * 4096, 2)
        into = bytearray(4096)
        assert key(2) in ssd and await ssd.read_into(key(2), memoryview(into))
        assert payload_of(into, 3900) == payload(2), "what waits can be read"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
