"""The SSD tier: blocks appended to segment files, found again after a restart by their headers.

Blocking, and meant for one thread (`in`, `len` and the figures may be read from others).
A segment is written once, from its beginning to its end; room is made by deleting the
segment whose blocks were used least recently. What a crash left half written has no
intact header, or a payload without its checksum: either is a miss.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    PAGE_BYTES,
    BlockHeader,
    BlockKey,
    Buffer,
    image_bytes,
    is_intact,
    read_header,
    write_generation,
)

log = logging.getLogger(__name__)

_LARGEST_SEGMENT_BYTES = 4 * 2**30
_SMALLEST_SEGMENT_BYTES = 2**20
_SEGMENTS_IN_QUOTA = 64
_PREFIX = "segment-"
_SUFFIX = ".kv"

Pwrite = Callable[[int, memoryview, int], int]


@dataclass(frozen=True, slots=True)
class _Place:
    segment_id: int
    offset: int
    header: BlockHeader


@dataclass(slots=True)
class _Segment:
    descriptor: int
    path: Path
    bytes: int = 0
    keys: set[BlockKey] = field(default_factory=set)


class SegmentFiles:
    """Blocks in the segment files of one directory, at most `quota_bytes` of files.

    Every method may raise OSError: the disk is full, broken or gone. The caller then
    decides whether to go on; what was indexed before stays as it was.
    """

    def __init__(self, directory: Path, *, quota_bytes: int, pwrite: Pwrite = os.pwrite) -> None:
        self.directory = directory
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self.corrupt = 0
        self.evictions = 0
        self._pwrite = pwrite
        self._segment_bytes = min(
            max(quota_bytes // _SEGMENTS_IN_QUOTA, _SMALLEST_SEGMENT_BYTES), _LARGEST_SEGMENT_BYTES
        )
        self._places: dict[BlockKey, _Place] = {}
        self._segments: OrderedDict[int, _Segment] = OrderedDict()
        """Oldest use first."""
        self._active: int | None = None
        self._last_segment = 0
        self._lock: int | None = None

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def header(self, key: BlockKey) -> BlockHeader | None:
        """What is known of a block without reading it; None where it is not here."""
        place = self._places.get(key)
        return place.header if place else None

    def open(self) -> None:
        """Take the directory for this process and index what lies there.

        Raises:
            OSError: it cannot be made, read or written, or another store has it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "another store uses the directory"
            raise OSError(errno.EBUSY, message, str(self.directory)) from error
        for path in sorted(self.directory.glob(f"{_PREFIX}*{_SUFFIX}")):
            number = path.name[len(_PREFIX) : -len(_SUFFIX)]
            if number.isdecimal():
                self._index(int(number), path)
        while self.used_bytes > self.quota_bytes:
            self._drop_segment(next(iter(self._segments)))

    def close(self) -> None:
        """Close all files; they stay on disk."""
        for segment in self._segments.values():
            os.close(segment.descriptor)
        if self._lock is not None:
            os.close(self._lock)
        self._segments.clear()
        self._places.clear()
        self._active, self._lock, self.used_bytes = None, None, 0

    def check(self) -> None:
        """Look whether the directory is still there, as open files alone would not tell.

        Raises:
            OSError: it is gone, or another one lies at its path.
        """
        there = os.stat(self.directory / "lock")
        if self._lock is None or there.st_ino != os.fstat(self._lock).st_ino:
            raise FileNotFoundError(errno.ENOENT, "the directory was replaced", str(self.directory))

    def append(self, image: Buffer) -> bool:
        """Write a block's image behind all others; False where it is corrupt, too large or here already."""
        header = read_header(image)
        if header is None or not is_intact(image, header):
            self.corrupt += 1
            return False
        if len(image) != image_bytes(header.payload_bytes):
            raise ValueError(f"an image of {len(image)} bytes for a payload of {header.payload_bytes}")
        if header.key in self._places or len(image) > self.quota_bytes:
            return False
        segment_id = self._room_for(len(image))
        segment = self._segments[segment_id]
        try:
            self._write_all(segment.descriptor, memoryview(image), segment.bytes)
        except OSError:
            os.ftruncate(segment.descriptor, segment.bytes)
            raise
        self._places[header.key] = _Place(segment_id, segment.bytes, header)
        segment.keys.add(header.key)
        segment.bytes += len(image)
        self.used_bytes += len(image)
        self._segments.move_to_end(segment_id)
        return True

    def read_into(self, key: BlockKey, image: memoryview) -> bool:
        """Read a block's image into memory of its length; False where it is not here or corrupt.

        The generation it shows is 0. A corrupt block is forgotten.
        """
        place = self._places.get(key)
        if place is None or len(image) != image_bytes(place.header.payload_bytes):
            return False
        segment = self._segments[place.segment_id]
        done = 0
        while done < len(image):
            count = os.preadv(segment.descriptor, [image[done:]], place.offset + done)
            if count == 0:
                break
            done += count
        header = read_header(image) if done == len(image) else None
        if header is None or header.key != key or not is_intact(image, header):
            self.corrupt += 1
            del self._places[key]
            segment.keys.discard(key)
            return False
        write_generation(image, 0)
        self._segments.move_to_end(place.segment_id)
        return True

    def _room_for(self, length: int) -> int:
        active = self._segments.get(self._active) if self._active is not None else None
        if active is not None and active.bytes + length > max(self._segment_bytes, length):
            self._active = None
        while self.used_bytes + length > self.quota_bytes:
            self._drop_segment(next(iter(self._segments)))
        if self._active is None:
            self._last_segment += 1
            path = self.directory / f"{_PREFIX}{self._last_segment:010d}{_SUFFIX}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._segments[self._last_segment] = _Segment(os.open(path, flags, 0o600), path)
            self._active = self._last_segment
        return self._active

    def _write_all(self, descriptor: int, data: memoryview, offset: int) -> None:
        while data:
            count = self._pwrite(descriptor, data, offset)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
            data, offset = data[count:], offset + count

    def _drop_segment(self, segment_id: int) -> None:
        segment = self._segments.pop(segment_id)
        os.close(segment.descriptor)
        for key in segment.keys:
            del self._places[key]
        self.evictions += len(segment.keys)
        self.used_bytes -= segment.bytes
        if self._active == segment_id:
            self._active = None
        segment.path.unlink(missing_ok=True)

    def _index(self, segment_id: int, path: Path) -> None:
        segment = _Segment(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
        segment.bytes = os.fstat(segment.descriptor).st_size
        self._segments[segment_id] = segment
        self._last_segment = max(self._last_segment, segment_id)
        self.used_bytes += segment.bytes
        offset = 0
        while offset + HEADER_BYTES <= segment.bytes:
            header = read_header(os.pread(segment.descriptor, HEADER_BYTES, offset))
            if header is None:
                # Behind a damaged header the next block begins at some later page.
                offset += PAGE_BYTES
                continue
            length = image_bytes(header.payload_bytes)
            if offset + length <= segment.bytes:
                # Written twice only where the older copy had been found corrupt.
                if older := self._places.get(header.key):
                    self._segments[older.segment_id].keys.discard(header.key)
                self._places[header.key] = _Place(segment_id, offset, header)
                segment.keys.add(header.key)
            offset += length
        if not segment.keys:
            self._drop_segment(segment_id)
