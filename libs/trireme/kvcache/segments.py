"""The segments of the SSD tier: how full each is, what lives in it, and which one gives way.

Pure bookkeeping; no file is touched. Bytes of dropped runs stay in their segment until it is
deleted, so the files may hold more than what lives: never more than the quota.
"""

from __future__ import annotations

import mmap

from trireme.kvcache.segment_sidecar import FoundBlock, FoundRun
from trireme.kvcache.stored_blocks import NOWHERE, Run

_LARGEST_SEGMENT_BYTES = 4 * 2**30
_SMALLEST_SEGMENT_BYTES = 2**20
_SEGMENTS_IN_QUOTA = 64
_LIVE_SHARE = 0.85
"""Share of the quota that may live; the rest is room for what is dropped and not yet deleted."""
_SHORT_SHARE = 0.92
"""Above this share of the quota in files, half-empty segments are moved together."""
_WORTH_MOVING = 0.5


class Segment:
    """One file."""

    __slots__ = ("descriptor", "is_changed", "is_out", "is_sealed", "live_bytes", "number", "runs",
                 "size_bytes", "use_s", "users")  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.descriptor = -1
        """Open file; -1 before its first write."""
        self.size_bytes = 0
        self.live_bytes = 0
        self.runs: dict[int, Run] = {}
        self.users = 0
        """Reads and writes in flight."""
        self.use_s = 0.0
        self.is_sealed = False
        self.is_changed = True
        """Whether its index on disk does not say what lives in it."""
        self.is_out = False
        """Whether it is to be deleted when its last user leaves."""

    @property
    def is_dead(self) -> bool:
        """Whether nothing lives in it and nothing more will."""
        return self.is_sealed and not self.runs and not self.is_out

    def append(self, length: int) -> int:
        """Take room at the end; its offset."""
        offset = self.size_bytes
        self.size_bytes += length
        return offset

    def take_back(self, offset: int, length: int) -> None:
        """Give room back that was not written, if nothing follows it; else it stays empty."""
        if self.size_bytes == offset + length:
            self.size_bytes = offset

    def found_runs(self, *, unix_s: float, now_s: float) -> list[FoundRun]:
        """What lives in it, for its index; times of use as seconds since 1970."""
        return [
            FoundRun(
                run.tenant,
                run.saved_unix_s,
                unix_s - (now_s - run.use_s),
                [
                    FoundBlock(block.key, block.payload_bytes, block.checksum, block.ssd_offset)
                    for block in run.blocks
                    if block.ssd_offset != NOWHERE
                ],
            )
            for run in self.runs.values()
        ]


class Segments:
    """All segments of a tier, at most `quota_bytes` of files."""

    def __init__(self, *, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
        self.by_number: dict[int, Segment] = {}
        self.live_bytes = 0
        self.live_blocks = 0
        self.evicted_blocks = 0
        """Blocks lost with a segment that gave way, since the start."""
        self._segment_bytes = min(
            max(quota_bytes // _SEGMENTS_IN_QUOTA, _SMALLEST_SEGMENT_BYTES), _LARGEST_SEGMENT_BYTES
        )
        self._last_number = 0
        self._active: Segment | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of files."""
        return sum(segment.size_bytes for segment in self.by_number.values())

    @property
    def live_capacity_bytes(self) -> int:
        """Most that should live; what is beyond is dropped by plan, not with whole segments."""
        return int(self.quota_bytes * _LIVE_SHARE)

    @property
    def active(self) -> Segment:
        """The segment that is written now."""
        if self._active is None:
            self._last_number += 1
            self._active = self.by_number[self._last_number] = Segment(self._last_number)
        return self._active

    def fits(self, length: int) -> bool:
        """Whether so much more can be written without anything giving way."""
        return self.used_bytes + length <= self.quota_bytes

    def in_the_way_of(self, length: int) -> Segment | None:
        """The segment to delete before `length` bytes can be written; None where none must, or none can."""
        if length > self.quota_bytes or self.fits(length):
            return None
        sealed = [segment for segment in self.by_number.values() if segment.is_sealed]
        if not sealed:
            if self._active is None:
                return None
            self._active.is_sealed, sealed = True, [self._active]
            self._active = None
        return min(sealed, key=lambda each: (bool(each.live_bytes), each.use_s, each.number))

    def seal_if_full(self, length: int) -> Segment | None:
        """The active segment, which takes no more, where `length` bytes would make it too large."""
        active = self._active
        if active is None or not active.size_bytes or active.size_bytes + length <= self._segment_bytes:
            return None
        active.is_sealed = True
        self._active = None
        return active

    def worth_moving(self) -> Segment | None:
        """The emptiest sealed segment, where files are near the quota and it is at most half full."""
        short_bytes = min(_SHORT_SHARE * self.quota_bytes, self.quota_bytes - 2 * self._segment_bytes)
        if self.used_bytes < short_bytes:
            return None
        sealed = [each for each in self.by_number.values() if each.is_sealed and not each.users]
        emptiest = min(sealed, key=lambda each: each.live_bytes / max(1, each.size_bytes), default=None)
        if emptiest is None or emptiest.live_bytes > _WORTH_MOVING * emptiest.size_bytes:
            return None
        return emptiest if self.fits(emptiest.live_bytes) else None

    def staging(self, run: Run) -> list[memoryview]:
        """Memory for a run's images, in whole pages at page borders, as direct I/O wants it."""
        memory = memoryview(mmap.mmap(-1, run.size_bytes))
        images, start = [], 0
        for block in run.blocks:
            images.append(memory[start : start + block.image_bytes])
            start += block.image_bytes
        return images

    def add_found(self, number: int, descriptor: int, size_bytes: int) -> Segment:
        """A segment that lay on the disk; it takes no more."""
        segment = self.by_number[number] = Segment(number)
        segment.descriptor, segment.size_bytes, segment.is_sealed = descriptor, size_bytes, True
        self._last_number = max(self._last_number, number)
        return segment

    def note_found(self, segment: Segment, run: Run) -> None:
        """A run lives in a segment that lay on the disk."""
        self._note(segment, run)
        segment.use_s = max(segment.use_s, run.use_s)

    def note_written(self, segment: Segment, run: Run, *, now_s: float) -> None:
        """A run was written."""
        self._note(segment, run)
        segment.use_s, segment.is_changed = now_s, True

    def forget(self, run: Run) -> Segment:
        """A run lives in its segment no more; the segment."""
        segment = self.by_number[run.segment]
        del segment.runs[run.number]
        segment.is_changed = True
        segment.live_bytes -= run.size_bytes
        self.live_bytes -= run.size_bytes
        self.live_blocks -= len(run.blocks)
        run.segment = 0
        return segment

    def note_shrunk(self, run: Run, size_bytes: int) -> None:
        """A block of a run that lives on is dropped."""
        segment = self.by_number[run.segment]
        segment.live_bytes -= size_bytes
        segment.is_changed = True
        self.live_bytes -= size_bytes
        self.live_blocks -= 1

    def take_out(self, segment: Segment) -> None:
        """A segment is no longer one of the tier's."""
        del self.by_number[segment.number]
        segment.is_out = True
        if self._active is segment:
            self._active = None

    def _note(self, segment: Segment, run: Run) -> None:
        segment.runs[run.number] = run
        run.segment = segment.number
        segment.live_bytes += run.size_bytes
        self.live_bytes += run.size_bytes
        self.live_blocks += len(run.blocks)
