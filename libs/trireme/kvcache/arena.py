"""One file in shared memory that the kvstore owns and the workers of its node map.

It begins with a page that names it and says how it is laid out, then come the residency index and
the slots. The page also shows the store's heartbeat, so that a worker sees without a call whether
anyone still answers for what the index says.

The owner holds a lock on the file for as long as it lives, so a file that nobody holds
locked belongs to a dead process and may be removed. The file is never truncated: a worker
that still maps the arena of a dead store reads stale bytes, which it takes for misses.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trireme.kvcache.block_codec import PAGE_BYTES
from trireme.kvcache.residency_index import BUCKET_WORDS, WORD_BYTES, index_words_for
from trireme.kvcache.slab_allocator import slab_bytes_for

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "trireme-kv-"
_SUFFIX = ".arena"
_MAGIC = b"TRIKVARENA-2".ljust(16, b"\0")
_ID_BYTES = 16
_LAYOUT = struct.Struct("<Q")
"""Words of the residency index; it follows the first page, the slots follow it."""
_LAYOUT_AT = len(_MAGIC) + _ID_BYTES
_STATE_AT = _LAYOUT_AT + _LAYOUT.size
"""Three words: the heartbeat (nanoseconds of CLOCK_MONOTONIC; 0: closed), the number of peers, and
whether the SSD tier can be read."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; the `mmap` module does not name it, and its madvise would hold the interpreter lock."""
_PREFAULT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaRef:
    """Where an arena is, and which one: enough for another process of the node to map it."""

    arena_id: bytes
    """16 random bytes that the file begins with, after a magic number."""
    path: str
    size_bytes: int


class Arena:
    """Mapped memory: a page that names it, the residency index, then `num_slabs` slabs for slots.

    Raises:
        FileNotFoundError: the layout that the first page tells does not fit into the file.
    """

    def __init__(self, ref: ArenaRef, memory: mmap.mmap) -> None:
        self.ref = ref
        # The views keep the mapping alive; it goes when the last of them does.
        self.memory = memoryview(memory)
        (index_words,) = _LAYOUT.unpack_from(memory, _LAYOUT_AT)
        buckets = index_words // BUCKET_WORDS
        self._slots_at = PAGE_BYTES + _pages(index_words * WORD_BYTES)
        if (
            index_words % BUCKET_WORDS
            or buckets & (buckets - 1)
            or not PAGE_BYTES < self._slots_at < ref.size_bytes
        ):
            raise FileNotFoundError(f"{ref.path} tells of an index of {index_words} words")
        self.index = self.memory[PAGE_BYTES : PAGE_BYTES + index_words * WORD_BYTES]
        self._state = self.memory[_STATE_AT : _STATE_AT + 3 * WORD_BYTES].cast("Q")
        self.slab_bytes = slab_bytes_for(ref.size_bytes - self._slots_at)
        self.num_slabs = (ref.size_bytes - self._slots_at) // self.slab_bytes

    def beat(self, now_ns: int, *, peers: int = 0) -> None:
        """Show that the store lives, and how many stores of other nodes it can ask; 0: it is closed."""
        self._state[1] = peers
        self._state[0] = now_ns

    def is_alive(self, now_ns: int, *, within_ns: int) -> bool:
        """Whether the store showed life so lately."""
        return self._state[0] + within_ns > now_ns

    def show_ssd(self, is_on: bool) -> None:
        """Show whether what is on SSD alone can be read."""
        self._state[2] = int(is_on)

    @property
    def is_ssd_on(self) -> bool:
        """Whether what is on SSD alone can be read."""
        return bool(self._state[2])

    @property
    def peers(self) -> int:
        """Stores of other nodes that this one can ask."""
        return self._state[1]

    def prefault(self, stop: threading.Event) -> None:
        """Put every page into this process's page table, so that the first copies are as fast as later ones.

        Contents stay as they are. Blocking, for a thread; returns early when `stop` is set, and
        without effect where the system cannot do it.
        """
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start in range(0, self.ref.size_bytes, _PREFAULT_BYTES):
            length = min(_PREFAULT_BYTES, self.ref.size_bytes - start)
            if stop.is_set() or madvise(base + start, length, _MADV_POPULATE_WRITE) != 0:
                return

    def image(self, offset: int, length: int) -> memoryview:
        """The `length` bytes at an offset from the beginning of the slots."""
        start = self.file_offset(offset)
        return self.memory[start : start + length]

    def file_offset(self, offset: int) -> int:
        """An offset from the beginning of the file, given one from the beginning of the slots."""
        return self._slots_at + offset


def arena_size_bytes(dram_bytes: int, *, index_words: int) -> int:
    """Length of a file with whole pages for `dram_bytes` of slots, at least one slab."""
    slots_bytes = max(dram_bytes // PAGE_BYTES * PAGE_BYTES, slab_bytes_for(0))
    return PAGE_BYTES + _pages(index_words * WORD_BYTES) + slots_bytes


@contextmanager
def own_arena(directory: Path, *, dram_bytes: int, ssd_bytes: int = 0) -> Iterator[Arena]:
    """Create an arena in `directory` and remove it when the block ends.

    `ssd_bytes` is the size of the tier below, whose blocks the residency index names too. Arenas of
    dead processes are removed first. All memory is allocated at once: a worker that wrote into memory
    that is not there would be killed by the system.

    Raises:
        OSError: the directory is not there, or has no room.
    """
    remove_stale_arenas(directory)
    index_words = index_words_for(dram_bytes, ssd_bytes)
    size_bytes = arena_size_bytes(dram_bytes, index_words=index_words)
    descriptor, path = _create_locked(directory)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        ref = ArenaRef(arena_id=secrets.token_bytes(_ID_BYTES), path=str(path), size_bytes=size_bytes)
        memory = mmap.mmap(descriptor, size_bytes)
        _LAYOUT.pack_into(memory, _LAYOUT_AT, index_words)
        memory[: len(_MAGIC) + _ID_BYTES] = _MAGIC + ref.arena_id
        arena = Arena(ref, memory)
        try:
            yield arena
        finally:
            arena.beat(0)
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def attach_arena(ref: ArenaRef) -> Arena:
    """Map an arena that another process owns.

    Raises:
        OSError: it is not there (any more), or another one lies at its path.
    """
    descriptor = os.open(ref.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_size != ref.size_bytes:
            raise FileNotFoundError(f"{ref.path} has another size than {ref.size_bytes} bytes")
        memory = mmap.mmap(descriptor, ref.size_bytes)
    finally:
        os.close(descriptor)
    if memory[: len(_MAGIC) + _ID_BYTES] != _MAGIC + ref.arena_id:
        raise FileNotFoundError(f"{ref.path} is another arena")
    return Arena(ref, memory)


def remove_stale_arenas(directory: Path) -> int:
    """Remove the arenas in `directory` whose owner is dead; returns how many."""
    removed = 0
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            log.info("arena_not_ours", extra={"path": str(path), "error": error.strerror})
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed += 1
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
    if removed:
        log.info("stale_arenas_removed", extra={"directory": str(directory), "arenas": removed})
    return removed


def _create_locked(directory: Path) -> tuple[int, Path]:
    while True:
        path = directory / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another store that starts now may have taken the file for stale before it was locked.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor, path
        os.close(descriptor)


def _pages(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES
