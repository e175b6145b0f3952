"""The SSD tier as the event loop sees it: written behind, read in one thread, able to vanish.

A full disk stops the writing, any other fault stops the tier; both are tried again later.
Neither is an error to the callers: what cannot be read is a miss, what cannot be written
is dropped and counted.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from trireme.kvcache.block_codec import BlockHeader, BlockKey, read_header, write_generation
from trireme.kvcache.segment_files import SegmentFiles
from trireme.runtime.clock import Clock

log = logging.getLogger(__name__)

R = TypeVar("R")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_S = 30.0
_CHECK_S = 1.0
_CLOSE_S = 2.0


class SsdTier:
    """Blocks in segment files, and those that wait to be written there."""

    def __init__(self, files: SegmentFiles, *, clock: Clock, queue_bytes: int) -> None:
        self._files = files
        self._clock = clock
        self._queue_limit_bytes = queue_bytes
        self._queue: OrderedDict[BlockKey, bytes] = OrderedDict()
        self._queued = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-ssd")
        self._fault = "not opened yet"
        self._full = ""
        self._retry_at_s = 0.0
        self._last_progress_s = clock.monotonic_s()
        self.queue_bytes = 0
        self.dropped = 0

    @classmethod
    @asynccontextmanager
    async def opened(cls, files: SegmentFiles, *, clock: Clock, queue_bytes: int) -> AsyncIterator[SsdTier]:
        """The tier, indexed if the directory can be used now; its files are closed at the end."""
        tier = cls(files, clock=clock, queue_bytes=queue_bytes)
        await tier._try_open()
        try:
            yield tier
        finally:
            await tier._close()

    @property
    def serving(self) -> bool:
        """Whether blocks can be read."""
        return not self._fault

    @property
    def status(self) -> str:
        """Why the tier is off or takes nothing; empty where all is well."""
        return self._fault or self._full

    @property
    def files(self) -> SegmentFiles:
        """The files, for their figures."""
        return self._files

    @property
    def queue_blocks(self) -> int:
        """Blocks that wait to be written."""
        return len(self._queue)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last write while blocks wait; 0 where none do."""
        return self._clock.monotonic_s() - self._last_progress_s if self._queue else 0.0

    def __contains__(self, key: BlockKey) -> bool:
        return self.serving and (key in self._queue or key in self._files)

    def header(self, key: BlockKey) -> BlockHeader | None:
        """What is known of a block; None where it is not here."""
        if not self.serving:
            return None
        image = self._queue.get(key)
        return read_header(image) if image is not None else self._files.header(key)

    def offer(self, key: BlockKey, image: memoryview) -> None:
        """Queue a copy of a block's image for writing, unless it is here or the queue is full."""
        if key in self:
            return
        if self.status or self.queue_bytes + len(image) > self._queue_limit_bytes:
            self.dropped += 1
            return
        if not self._queue:
            self._last_progress_s = self._clock.monotonic_s()
        self._queue[key] = bytes(image)
        self.queue_bytes += len(image)
        self._queued.set()

    async def read_into(self, key: BlockKey, image: memoryview) -> bool:
        """Copy a block's image into memory of its length; False where it cannot be had.

        The generation it shows is 0. Not to be cancelled: the thread goes on writing to `image`.
        """
        waiting = self._queue.get(key)
        if waiting is not None and len(waiting) == len(image):
            image[:] = waiting
            write_generation(image, 0)
            return True
        try:
            return await self._in_thread(lambda: self._files.read_into(key, image))
        except OSError as error:
            await self._fail(error)
            return False

    async def write_through(self, image: memoryview) -> bool:
        """Write an image that stays in place meanwhile; False where the tier takes nothing."""
        if self.status:
            return False
        try:
            await self._in_thread(lambda: self._files.append(image))
        except OSError as error:
            await self._fail(error)
            return False
        return True

    async def run(self) -> None:
        """Write what is queued and look after the disk, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_behind())
            tasks.create_task(self._look_after())

    async def check(self) -> None:
        """Look whether the disk is there; try again what failed, where it is time."""
        if self._fault:
            if self._clock.monotonic_s() >= self._retry_at_s:
                await self._try_open()
            return
        if self._full and self._clock.monotonic_s() >= self._retry_at_s:
            self._full = ""
        try:
            await self._in_thread(self._files.check)
        except OSError as error:
            await self._fail(error)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_S)
            await self.check()

    async def _write_behind(self) -> None:
        while True:
            await self._queued.wait()
            while self._queue:
                key, image = next(iter(self._queue.items()))
                try:
                    await self._in_thread(functools.partial(self._files.append, image))
                except OSError as error:
                    await self._fail(error)
                if self._queue.pop(key, None) is not None:
                    self.queue_bytes -= len(image)
                self._last_progress_s = self._clock.monotonic_s()
            self._queued.clear()

    async def _fail(self, error: OSError) -> None:
        self._retry_at_s = self._clock.monotonic_s() + _RETRY_S
        reason = error.strerror or str(error)
        self.dropped += len(self._queue)
        self._queue.clear()
        self.queue_bytes = 0
        if error.errno in _FULL and self.serving:
            self._full = f"ssd tier takes nothing: {reason}"
            log.warning("kv_ssd_full", extra={"error": reason, "retry_s": _RETRY_S})
            return
        if not self._fault:
            log.warning("kv_ssd_off", extra={"error": reason, "retry_s": _RETRY_S})
        self._fault = f"ssd tier is off: {reason}"
        await self._in_thread(self._files.close)

    async def _try_open(self) -> None:
        try:
            await self._in_thread(self._files.open)
        except OSError as error:
            await self._fail(error)
            return
        self._fault, self._full = "", ""
        log.info("kv_ssd_on", extra={"blocks": len(self._files), "bytes": self._files.used_bytes})

    async def _close(self) -> None:
        closing = asyncio.create_task(self._in_thread(self._files.close))
        await asyncio.wait({closing}, timeout=_CLOSE_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
