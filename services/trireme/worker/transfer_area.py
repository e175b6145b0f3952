"""Memory that a worker and its engine process share, for KV blocks on their way to and from the store.

The worker owns the bookkeeping: it says where a block is to be read or written, so that the bytes pass
the process boundary without being sent. Nothing is left of it when both have ended.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left, insort

_ALIGNMENT = 64


class TransferArea:
    """Room to be taken and given back. The lowest is taken first, so that little memory is ever touched."""

    def __init__(self, size_bytes: int) -> None:
        self.descriptor = os.memfd_create("trireme-transfer", os.MFD_CLOEXEC)
        """For `map_area` in the other process."""
        os.ftruncate(self.descriptor, size_bytes)
        self.memory = map_area(self.descriptor)
        self.size_bytes = size_bytes
        self._taken: list[tuple[int, int]] = []
        """(offset, length), sorted; they do not overlap."""

    def close(self) -> None:
        """Let go of the file; what is mapped stays until it is forgotten."""
        os.close(self.descriptor)

    def take(self, length: int) -> int | None:
        """The offset of `length` free bytes; None where there is no such gap."""
        wanted = -(-max(1, length) // _ALIGNMENT) * _ALIGNMENT
        free_from = 0
        for offset, taken in self._taken:
            if offset - free_from >= wanted:
                break
            free_from = offset + taken
        if free_from + wanted > self.size_bytes:
            return None
        insort(self._taken, (free_from, wanted))
        return free_from

    def give_back(self, offset: int) -> None:
        """End the use of what `take` returned."""
        index = bisect_left(self._taken, (offset, 0))
        assert self._taken[index][0] == offset, "nobody took it"
        del self._taken[index]


def map_area(descriptor: int) -> memoryview:
    """All bytes of the area behind an open file, writable."""
    return memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
