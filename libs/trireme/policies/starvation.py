"""Who waits too long: the line in which jobs of lower levels stand for a promotion.

First is who ran longest ago. A scan looks at the head of the line only, so the time of a promotion is known
for those few; for all others it is far enough away not to count in their ENST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from trireme.policies.run_queue import Entry, RunQueue

HEAD = 8
"""How many of those next in line a scan looks at, and ENST knows."""

Place = tuple[float, int, int, str]
"""(end of the last iteration, level, ticket, id)."""


class StarvationLine:
    """Jobs below level 1 that wait.

    Args:
        queue: where they wait.
        starving_s: alpha; infinity: nobody stands in line.
        most: promotions per scan.
    """

    def __init__(self, queue: RunQueue, *, starving_s: float, most: int) -> None:
        self._queue = queue
        self._starving_s = starving_s
        self._most = most
        self._heap: list[Place] = []
        """With stale places among them, which are dropped when they come to the head."""
        self._head: list[Entry] = []
        """The next few, as of the last scan."""

    def __len__(self) -> int:
        """Those that stand here, and some that have left."""
        return len(self._heap)

    def add(self, entry: Entry) -> None:
        """It begins to wait."""
        if self._starving_s == math.inf or not self._most or entry.level == 1:
            return
        heappush(self._heap, (entry.last_s, entry.level, entry.key[1], entry.job.sequence_id))
        if len(self._heap) > 2 * len(self._queue.entries) + 64:
            self._heap = [place for place in self._heap if self._find(place) is not None]
            heapify(self._heap)

    def scan(self, fits: Callable[[Entry], bool], *, now_s: float) -> list[Entry]:
        """Those to be promoted now, at most `most`: they starve, and `fits` says that their KV can come."""
        chosen: list[Entry] = []
        kept: list[Place] = []
        self._head = []
        while self._heap and len(self._head) < HEAD:
            place = heappop(self._heap)
            entry = self._find(place)
            if entry is None or place in kept:
                continue
            starves = now_s - entry.last_s > self._starving_s
            if starves and len(chosen) < self._most and fits(entry):
                chosen.append(entry)
            else:
                kept.append(place)
                self._head.append(entry)
        for place in kept:
            heappush(self._heap, place)
        return chosen

    def expected_s(self, scan_s: float, period_s: float, *, now_s: float) -> Iterator[tuple[Entry, float]]:
        """T_promote of the next few: when each starves, and not before the scan that reaches it.

        Args:
            scan_s: until the next scan.
            period_s: from one scan to the next.
        """
        for index, entry in enumerate(self._head):
            if self._may_be_promoted(entry):
                starves_s = self._starving_s - (now_s - entry.last_s)
                yield entry, max(0.0, starves_s, scan_s + index // self._most * period_s)

    def _find(self, place: Place) -> Entry | None:
        """The job that still waits at this place."""
        last_s, _, ticket, sequence_id = place
        entry = self._queue.entries.get(sequence_id)
        if entry is None or entry.last_s != last_s or entry.key[1] != ticket:
            return None
        return entry if self._may_be_promoted(entry) else None

    def _may_be_promoted(self, entry: Entry) -> bool:
        sequence_id = entry.job.sequence_id
        return (
            entry.level > 1
            and sequence_id not in self._queue.members
            and self._queue.entries.get(sequence_id) is entry
        )
