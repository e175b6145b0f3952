"""Where runs go in the segments: appended, sealed, and room made by letting whole segments go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trireme.kvcache.block_codec import is_intact, read_header
from trireme.kvcache.disk_threads import DiskCall, DiskThreads
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.segments import Segment, Segments
from trireme.kvcache.stored_blocks import NOWHERE, Block, Run
from trireme.runtime.clock import Clock


class SegmentWriter:
    """The one thread that writes, and the bookkeeping of what it writes.

    `on_lost` hears of runs whose segment had to go, `on_corrupt` of blocks whose bytes in memory were wrong.
    """

    def __init__(
        self,
        files: SegmentFiles,
        segments: Segments,
        thread: DiskThreads,
        *,
        clock: Clock,
        on_lost: Callable[[Run], None],
        on_corrupt: Callable[[Block], None],
    ) -> None:
        self._files = files
        self._segments = segments
        self._thread = thread
        self._clock = clock
        self._on_lost = on_lost
        self._on_corrupt = on_corrupt

    async def append(
        self, images: Sequence[memoryview], when_returned: Callable[[], None]
    ) -> tuple[Segment, int, list[bool]] | None:
        """Write images at the end of a segment; where, and which of them were sound."""
        length = sum(map(len, images))
        segment = self._room_for(length)
        if segment is None:
            when_returned()
            return None
        offset = segment.append(length)
        segment.users += 1
        call = self._thread.submit(lambda: self._write_now(segment, images, offset))

        def leave() -> None:
            when_returned()
            self.leave(segment)

        call.when_returned(leave)
        try:
            sound = await call.outcome
        except OSError:
            segment.take_back(offset, length)
            return None
        return None if segment.is_out else (segment, offset, sound)

    def note(
        self,
        run: Run,
        blocks: Sequence[Block],
        images: Sequence[memoryview],
        segment: Segment,
        offset: int,
        sound: Sequence[bool],
    ) -> bool:
        """Note where `append` put a run's blocks; False where none of them is left."""
        for block, image, is_sound in zip(blocks, images, sound, strict=True):
            if block.run is run and is_sound:
                block.ssd_offset = offset
            elif block.run is run:
                self._on_corrupt(block)
            offset += len(image)
        if run.blocks:
            self._segments.note_written(segment, run, now_s=self._clock.monotonic_s())
        return bool(run.blocks)

    def _write_now(self, segment: Segment, images: Sequence[memoryview], offset: int) -> list[bool]:
        sound = []
        for image in images:
            header = read_header(image)
            sound.append(header is not None and is_intact(image, header))
        if segment.descriptor < 0:
            segment.descriptor = self._files.create(segment.number)
        self._files.write(segment.descriptor, images, offset)
        return sound

    def _room_for(self, length: int) -> Segment | None:
        self.shrink(length)
        if not self._segments.fits(length):
            return None
        sealed = self._segments.seal_if_full(length)
        if sealed is not None:
            self.seal(sealed)
        return self._segments.active

    def shrink(self, length: int) -> None:
        """Let whole segments give way until so much more can be written, or those left are in use."""
        while (victim := self._segments.in_the_way_of(length)) is not None and not victim.users:
            self._segments.evicted_blocks += sum(len(run.blocks) for run in victim.runs.values())
            self.lose_all_of(victim)
            self.remove(victim)

    def lose_all_of(self, segment: Segment) -> None:
        """Forget everything in a segment."""
        for run in list(segment.runs.values()):
            self._segments.forget(run)
            for block in run.blocks:
                block.ssd_offset = NOWHERE
            self._on_lost(run)

    def seal(self, segment: Segment) -> DiskCall[None]:
        """Write a segment's index beside it."""
        runs = segment.found_runs(unix_s=self._clock.unix_s(), now_s=self._clock.monotonic_s())
        size_bytes = segment.size_bytes
        segment.is_changed = False
        return self._thread.submit(lambda: self._files.seal(segment.number, runs, segment_bytes=size_bytes))

    def remove(self, segment: Segment) -> None:
        """Delete a segment, now or when its last user leaves."""
        self._segments.take_out(segment)
        if not segment.users:
            self._delete(segment)

    def leave(self, segment: Segment) -> None:
        """One read or write in a segment less."""
        segment.users -= 1
        if segment.is_out and not segment.users:
            self._delete(segment)

    def _delete(self, segment: Segment) -> None:
        if segment.descriptor >= 0:
            self._thread.submit(lambda: self._files.remove(segment.number, segment.descriptor))
