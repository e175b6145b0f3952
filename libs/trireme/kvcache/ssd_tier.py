"""The SSD tier as the event loop sees it: segments, what lives in them, and a disk that may fail.

All bookkeeping happens on the loop; threads only move bytes. A full disk stops the writing; any
other fault, and a call that does not come back, stops the tier. Both are tried again later.
Neither is an error to the callers: what cannot be read is a miss, what cannot be written stays
where it was or is dropped, and is counted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from trireme.kvcache.disk_threads import DiskCall, DiskThreads
from trireme.kvcache.segment_files import FoundSegment, SegmentFiles
from trireme.kvcache.segment_sidecar import FoundRun
from trireme.kvcache.segment_writer import SegmentWriter
from trireme.kvcache.segments import Segment, Segments
from trireme.kvcache.stored_blocks import NOWHERE, Block, Run
from trireme.runtime.clock import Clock

log = logging.getLogger(__name__)

R = TypeVar("R")

HANG_S = 3.0
"""A call that takes longer does not come back: the tier goes off."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_S = 30.0
_WATCH_S = 0.25
_CHECK_EVERY = 4
_OPEN_S = 10.0
"""A start waits for the index no longer; then the tier comes on when it is read."""
_CLOSE_S = 2.0
_READERS = 2
_ADOPTED_AT_ONCE = 256
"""Runs taken over from an index between two turns of the loop."""


class SsdOwner(Protocol):
    """Who holds the runs, and hears what becomes of them."""

    def adopt(self, found: FoundRun) -> Run | None:
        """A run lay on the disk at start; None where it is not wanted."""

    def ssd_adopted(self, runs: Sequence[Run]) -> None:
        """The tier has noted where adopted runs lie."""

    def ssd_lost(self, run: Run) -> None:
        """A run's copy is no longer on SSD; `run.segment` is 0 now."""

    def block_is_corrupt(self, block: Block) -> None:
        """A block's bytes in memory are not what was saved: it is to be dropped."""

    def ssd_block_is_corrupt(self, block: Block) -> None:
        """A block's bytes on SSD are not what was saved: it is to be dropped."""

    def ssd_turned(self, is_on: bool) -> None:
        """The tier can be read from now on, or cannot."""


class SsdTier:
    """Runs in segment files."""

    def __init__(self, files: SegmentFiles, *, quota_bytes: int, clock: Clock, owner: SsdOwner) -> None:
        self._files = files
        self._clock = clock
        self._owner = owner
        self._segments = Segments(quota_bytes=quota_bytes)
        self._writing = DiskThreads(1, name="kv-ssd-write", clock=clock, on_error=self.fail)
        self._reading = DiskThreads(_READERS, name="kv-ssd-read", clock=clock, on_error=self.fail)
        self._writer = SegmentWriter(
            files,
            self._segments,
            self._writing,
            clock=clock,
            on_lost=owner.ssd_lost,
            on_corrupt=owner.block_is_corrupt,
        )
        self._fault = "not opened yet"
        self._full = ""
        self._is_indexed = False
        self._retry_at_s = 0.0
        self._opening: asyncio.Task[None] | None = None
        self.unwritten = 0
        """Blocks that could not be written, since the start."""
        self.hangs = 0
        """Times that the disk did not answer, since the start."""

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Open, wait for the index if that can be had soon, and leave the files in order at the end."""
        self._opening = asyncio.create_task(self._try_open())
        await asyncio.wait({self._opening}, timeout=_OPEN_S)
        try:
            yield
        finally:
            await self._close()

    @property
    def serving(self) -> bool:
        """Whether blocks can be read."""
        return not self._fault

    @property
    def is_writable(self) -> bool:
        """Whether blocks can be written."""
        return not (self._fault or self._full)

    @property
    def status(self) -> str:
        """Why the tier is off or takes nothing; empty where all is well."""
        return self._fault or self._full

    @property
    def segments(self) -> Segments:
        """The segments, for their figures."""
        return self._segments

    @property
    def waiting_writes(self) -> int:
        """Calls that the writing thread has not ended."""
        return self._writing.waiting

    def begin_read(self, blocks: Sequence[Block], images: Sequence[memoryview]) -> DiskCall[list[bool]]:
        """Read blocks of one run into memory of their length; tells which came sound.

        The images show generation 0 or whatever was written. Memory is in use until the call has returned.
        """
        assert blocks[0].run is not None
        segment = self._segments.by_number[blocks[0].run.segment]
        segment.use_s = self._clock.monotonic_s()
        wanted = [(block.key, block.ssd_offset, image) for block, image in zip(blocks, images, strict=True)]
        segment.users += 1
        call = self._reading.submit(lambda: self._files.read(segment.descriptor, wanted))
        call.when_returned(lambda: self._writer.leave(segment))
        return call

    async def write(
        self, run: Run, images: Sequence[memoryview], *, when_returned: Callable[[], None]
    ) -> bool:
        """Write a run's blocks and note where they are; False where that failed. Corrupt ones are dropped.

        `images` stay as they are until `when_returned` is called, which may be before or after this ends.
        """
        blocks = list(run.blocks)
        if not self.is_writable:
            when_returned()
            return False
        placed = await self._writer.append(images, when_returned)
        if placed is None:
            self.unwritten += len(blocks)
            return False
        return self._writer.note(run, blocks, images, *placed)

    def drop(self, run: Run) -> None:
        """Forget a run's copy; the segment's room comes back when all in it is dropped, or moved."""
        segment = self._segments.forget(run)
        for block in run.blocks:
            block.ssd_offset = NOWHERE
        if segment.is_dead:
            self._writer.remove(segment)

    def fail(self, error: OSError) -> None:
        """The disk is full, or it failed: stop writing, or stop altogether, for a while."""
        self._retry_at_s = self._clock.monotonic_s() + _RETRY_S
        reason = error.strerror or str(error)
        if error.errno in _FULL and self.serving:
            self._full = f"ssd tier takes nothing: {reason}"
            log.warning("kv_ssd_full", extra={"error": reason, "retry_s": _RETRY_S})
            return
        was_on = self.serving
        self._fault = f"ssd tier is off: {reason}"
        for threads in (self._reading, self._writing):
            threads.give_up(OSError(error.errno, reason))
        if was_on:
            log.warning("kv_ssd_off", extra={"error": reason, "retry_s": _RETRY_S})
            self._owner.ssd_turned(False)

    async def run(self) -> None:
        """Look after the disk, for ever."""
        turn = 0
        while True:
            await asyncio.sleep(_WATCH_S)
            turn += 1
            self.watch()
            if turn % _CHECK_EVERY == 0:
                await self.check()
                await self.compact()

    def watch(self) -> None:
        """Turn the tier off where the disk does not answer."""
        stuck_s = max(self._reading.stuck_s, self._writing.stuck_s)
        if stuck_s > HANG_S and self.serving:
            self.hangs += 1
            self.fail(OSError(errno.ETIMEDOUT, f"the disk has not answered for {stuck_s:.0f} s"))

    async def check(self) -> None:
        """Look whether the disk is there; try again what failed, where it is time."""
        now_s = self._clock.monotonic_s()
        if self._fault:
            is_opening = self._opening is not None and not self._opening.done()
            if now_s >= self._retry_at_s and not (self._stuck or is_opening):
                self._opening = asyncio.create_task(self._try_open())
                await asyncio.wait({self._opening}, timeout=_OPEN_S)
            return
        if self._full and now_s >= self._retry_at_s:
            self._full = ""
        if not self._reading.waiting:
            await asyncio.wait({self._reading.submit(self._files.check).outcome})

    async def compact(self) -> None:
        """Where room runs short, move what lives in the emptiest sealed segment, and delete it."""
        segment = self._segments.worth_moving()
        if segment is None or not self.is_writable:
            return
        for run in list(segment.runs.values()):
            if run.segment == segment.number and self.is_writable:
                await self._move(run, segment)
        if segment.is_dead:
            self._writer.remove(segment)

    @property
    def _stuck(self) -> bool:
        return bool(self._reading.waiting or self._writing.waiting)

    async def _move(self, run: Run, segment: Segment) -> None:
        blocks, buffers = list(run.blocks), self._segments.staging(run)
        try:
            found = await self.begin_read(blocks, buffers).outcome
        except OSError:
            return
        for block, is_sound in zip(blocks, found, strict=True):
            if not is_sound and block.run is run:
                self._owner.ssd_block_is_corrupt(block)
        if not all(found) or not self.is_writable:
            return  # what is left of it moves in the next turn
        placed = await self._writer.append(buffers, lambda: None)
        if placed is not None and run.segment == segment.number:
            self._segments.forget(run)
            self._writer.note(run, blocks, buffers, *placed)

    async def _try_open(self) -> None:
        if self._is_indexed:
            # The same directory as before has the same segments: nothing needs to be read again.
            call = self._reading.submit(self._files.check)
            try:
                await call.outcome
            except OSError:
                await self._forget_all()
            else:
                self._turn_on()
                return
        opening = self._reading.submit(self._files.open)
        try:
            found = await opening.outcome
        except OSError:
            return
        await self._adopt(found)
        self._is_indexed = True
        self._writer.shrink(0)
        self._turn_on()
        log.info("kv_ssd_on", extra={"bytes": self._segments.used_bytes, "direct_io": self._files.is_direct})

    def _turn_on(self) -> None:
        self._fault, self._full = "", ""
        self._owner.ssd_turned(True)

    async def _adopt(self, found: Sequence[FoundSegment]) -> None:
        for each in found:
            segment = self._segments.add_found(each.number, each.descriptor, each.size_bytes)
            for start in range(0, len(each.runs), _ADOPTED_AT_ONCE):
                self._adopt_some(segment, each.runs[start : start + _ADOPTED_AT_ONCE])
                await asyncio.sleep(0)
            segment.is_changed = not each.is_sealed
            if segment.is_dead:
                self._writer.remove(segment)
            elif not each.is_sealed:
                self._writer.seal(segment)
            await asyncio.sleep(0)

    def _adopt_some(self, segment: Segment, found: Sequence[FoundRun]) -> None:
        adopted = [run for each in found if (run := self._owner.adopt(each)) is not None]
        # A block may be found twice: the run that named it first has lost it then.
        adopted = [run for run in adopted if run.blocks]
        for run in adopted:
            self._segments.note_found(segment, run)
        self._owner.ssd_adopted(adopted)

    async def _forget_all(self) -> None:
        self._is_indexed = False
        segments = list(self._segments.by_number.values())
        for segment in segments:
            self._writer.lose_all_of(segment)
            self._segments.take_out(segment)
            await asyncio.sleep(0)
        descriptors = [segment.descriptor for segment in segments if segment.descriptor >= 0]
        # Before the directory is opened again, or the new lock might be closed with the old files.
        await asyncio.wait({self._reading.submit(lambda: self._files.close(descriptors)).outcome})

    async def _close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        segments = self._segments.by_number.values()
        calls: list[DiskCall[None]] = []
        if self.is_writable:
            calls += [self._writer.seal(segment) for segment in segments if segment.is_changed]
        descriptors = [segment.descriptor for segment in segments if segment.descriptor >= 0]
        calls.append(self._writing.submit(lambda: self._files.close(descriptors)))
        await asyncio.wait({call.outcome for call in calls}, timeout=_CLOSE_S)
        for threads in (self._reading, self._writing):
            threads.close()
