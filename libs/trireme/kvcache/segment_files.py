"""The SSD tier's files: blocks appended to segments, found again after a restart.

Blocking, and meant for threads; it keeps no index. A segment is written once, from its beginning to
its end, in whole pages and past the page cache where the file system allows it (O_DIRECT), so that the
store's memory is what its settings say. What a crash left half written has no intact header, or a
payload without its checksum: either is a miss.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    PAGE_BYTES,
    BlockKey,
    image_bytes,
    is_intact,
    read_header,
)
from trireme.kvcache.segment_sidecar import FoundBlock, FoundRun, decode_sidecar, encode_sidecar

log = logging.getLogger(__name__)

_PREFIX = "segment-"
_SUFFIX = ".kv"
_SIDECAR = ".index"
_BUFFERS_PER_CALL = 512
_NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class DiskCalls:
    """The system calls that move bytes; a test puts a failing disk in their place."""

    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """A segment that lay in the directory, and what is in it."""

    number: int
    descriptor: int
    size_bytes: int
    is_sealed: bool
    """Whether its index was there, so that it was not scanned."""
    runs: Sequence[FoundRun]


class SegmentFiles:
    """One directory of segments, for one store at a time.

    Every method may raise OSError: the disk is full, broken or gone.
    """

    def __init__(self, directory: Path, *, calls: DiskCalls | None = None) -> None:
        self.directory = directory
        self.is_direct = False
        """Whether the page cache is passed by."""
        self._calls = calls or DiskCalls()
        self._lock: int | None = None

    def open(self) -> list[FoundSegment]:
        """Take the directory for this process; the segments that lie there, oldest first.

        Raises:
            OSError: it cannot be made, read or written, or another store has it.
        """
        self.close([])
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close([])
            message = "another store uses the directory"
            raise OSError(errno.EBUSY, message, str(self.directory)) from error
        self.is_direct = _takes_direct_io(self.directory / "lock")
        return [self._found(number, path) for number, path in self._segments()]

    def close(self, descriptors: Sequence[int]) -> None:
        """Close segments and leave the directory to others; the files stay."""
        for descriptor in descriptors:
            os.close(descriptor)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Look whether the directory is still there, as open files alone would not tell.

        Raises:
            OSError: it is gone, or another one lies at its path.
        """
        there = os.stat(self.directory / "lock")
        if self._lock is None or there.st_ino != os.fstat(self._lock).st_ino:
            raise FileNotFoundError(errno.ENOENT, "the directory was replaced", str(self.directory))

    def create(self, number: int) -> int:
        """The descriptor of a new, empty segment."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._direct
        return os.open(self._path(number), flags, 0o600)

    def write(self, descriptor: int, images: Sequence[memoryview], offset: int) -> None:
        """Write images one behind the other, whole pages at an offset of whole pages.

        Raises:
            OSError: ENOSPC also where the disk took a part only.
        """
        for start in range(0, len(images), _BUFFERS_PER_CALL):
            part = images[start : start + _BUFFERS_PER_CALL]
            length = sum(map(len, part))
            written = self._calls.pwritev(descriptor, part, offset)
            if written != length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
            if not self.is_direct:
                # Only clean pages leave the cache.
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            offset += length

    def read(self, descriptor: int, wanted: Sequence[tuple[BlockKey, int, memoryview]]) -> list[bool]:
        """Read images (key, offset, memory of its length); which of them are whole and sound."""
        arrived: list[bool] = []
        for group in _neighbours(wanted):
            offset, images = group[0][1], [image for _, _, image in group]
            length = sum(map(len, images))
            count = self._calls.preadv(descriptor, images, offset)
            if not self.is_direct:
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            end = 0
            for _, _, image in group:
                end += len(image)
                arrived.append(end <= count)
        return [
            whole and _is_sound(image, key) for whole, (key, _, image) in zip(arrived, wanted, strict=True)
        ]

    def seal(self, number: int, runs: Sequence[FoundRun], *, segment_bytes: int) -> None:
        """Write the index of a segment that takes no more blocks, or whose uses have changed."""
        path = self._path(number).with_suffix(_SIDECAR)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(encode_sidecar(runs, segment_bytes=segment_bytes))
        fresh.replace(path)

    def remove(self, number: int, descriptor: int) -> None:
        """Delete a segment."""
        os.close(descriptor)
        path = self._path(number)
        path.with_suffix(_SIDECAR).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @property
    def _direct(self) -> int:
        return os.O_DIRECT if self.is_direct else 0

    def _path(self, number: int) -> Path:
        return self.directory / f"{_PREFIX}{number:010d}{_SUFFIX}"

    def _segments(self) -> list[tuple[int, Path]]:
        found = []
        for path in sorted(self.directory.glob(f"{_PREFIX}*{_SUFFIX}")):
            number = path.name[len(_PREFIX) : -len(_SUFFIX)]
            if number.isdecimal():
                found.append((int(number), path))
        return found

    def _found(self, number: int, path: Path) -> FoundSegment:
        size_bytes = path.stat().st_size // PAGE_BYTES * PAGE_BYTES
        sidecar = path.with_suffix(_SIDECAR)
        runs = decode_sidecar(sidecar.read_bytes(), segment_bytes=size_bytes) if sidecar.exists() else None
        is_sealed = runs is not None
        if runs is None:
            runs = _scan(path, size_bytes)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | self._direct)
        return FoundSegment(number, descriptor, size_bytes, is_sealed, runs)


def _takes_direct_io(path: Path) -> bool:
    """Whether reads and writes of whole pages may pass the page cache by; tried on this file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return False
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            os.pwritev(descriptor, [page], 0)
        return True
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return False
    finally:
        os.close(descriptor)


def _is_sound(image: memoryview, key: BlockKey) -> bool:
    header = read_header(image)
    return header is not None and header.key == key and is_intact(image, header)


def _neighbours(
    wanted: Sequence[tuple[BlockKey, int, memoryview]],
) -> list[list[tuple[BlockKey, int, memoryview]]]:
    """The images in groups that lie one behind the other."""
    groups: list[list[tuple[BlockKey, int, memoryview]]] = []
    end = -1
    for each in wanted:
        if each[1] == end and len(groups[-1]) < _BUFFERS_PER_CALL:
            groups[-1].append(each)
        else:
            groups.append([each])
        end = each[1] + len(each[2])
    return groups


def _scan(path: Path, size_bytes: int) -> list[FoundRun]:
    """The runs of a segment without an index, by the headers of its blocks."""
    runs: list[FoundRun] = []
    blocks: list[FoundBlock] = []
    tenant, saved_unix_s, offset = "", 0.0, 0

    def end_run() -> None:
        if blocks:
            runs.append(FoundRun(tenant, saved_unix_s, saved_unix_s, blocks))

    with path.open("rb", buffering=0) as file:
        while offset + HEADER_BYTES <= size_bytes:
            header = read_header(os.pread(file.fileno(), HEADER_BYTES, offset))
            if header is None:
                # Behind a damaged header the next block begins at some later page.
                offset += PAGE_BYTES
                continue
            length = image_bytes(header.payload_bytes)
            if offset + length <= size_bytes:
                if header.position == 0 or header.tenant != tenant or header.saved_unix_s != saved_unix_s:
                    end_run()
                    blocks, tenant, saved_unix_s = [], header.tenant, header.saved_unix_s
                blocks.append(FoundBlock(header.key, header.payload_bytes, header.checksum, offset))
            offset += length
        end_run()
    return runs
