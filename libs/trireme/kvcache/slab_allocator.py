"""Slots of many sizes in one piece of memory, given out and taken back in constant time.

The memory is cut into slabs of one size; a slab serves one slot size at a time and goes
back to the common pool when its last slot is freed. Pure bookkeeping: no memory is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_PAGE_BYTES = 4096
_SMALLEST_SLAB_BYTES = 64 * 1024
_LARGEST_SLAB_BYTES = 64 * 2**20


def slab_bytes_for(total_bytes: int) -> int:
    """A slab size that leaves about 32 slabs, so that several slot sizes can live side by side."""
    wanted = total_bytes // 32 // _PAGE_BYTES * _PAGE_BYTES
    return min(max(wanted, _SMALLEST_SLAB_BYTES), _LARGEST_SLAB_BYTES)


@dataclass(slots=True)
class _Slab:
    slot_bytes: int
    used: int = 0
    untouched: int = 0
    """Slots from this index on were never given out."""
    freed: list[int] = field(default_factory=list)


class SlabAllocator:
    """Offsets in [0, num_slabs * slab_bytes); two slots in use never overlap."""

    def __init__(self, *, num_slabs: int, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.num_slabs = num_slabs
        self.used_bytes = 0
        self._free_slot_bytes = 0
        self._last_slot_bytes = _PAGE_BYTES
        self._slabs: dict[int, _Slab] = {}
        self._empty = list(range(num_slabs - 1, -1, -1))
        # Slabs with a free slot, by slot size; a dict keeps an order that a set would not.
        self._open: dict[int, dict[int, None]] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes that slots of the size asked for last, or of sizes in use, can still take."""
        slots = self.slab_bytes // self._last_slot_bytes
        return self._free_slot_bytes + len(self._empty) * slots * self._last_slot_bytes

    def allocate(self, slot_bytes: int) -> int | None:
        """The offset of a free slot; None where neither an open slab nor an empty one is left."""
        if not 0 < slot_bytes <= self.slab_bytes:
            return None
        self._last_slot_bytes = slot_bytes
        candidates = self._open.setdefault(slot_bytes, {})
        if candidates:
            index = next(iter(candidates))
        elif self._empty:
            index = self._empty.pop()
            self._slabs[index] = _Slab(slot_bytes)
            candidates[index] = None
            self._free_slot_bytes += self._slots_bytes(slot_bytes)
        else:
            return None
        slab = self._slabs[index]
        if slab.freed:
            slot = slab.freed.pop()
        else:
            slot = slab.untouched
            slab.untouched += 1
        slab.used += 1
        self.used_bytes += slot_bytes
        self._free_slot_bytes -= slot_bytes
        if slab.used == self.slab_bytes // slot_bytes:
            del candidates[index]
        return index * self.slab_bytes + slot * slot_bytes

    def free(self, offset: int) -> None:
        """Take back a slot that `allocate` gave out."""
        index = self.slab_of(offset)
        slab = self._slabs[index]
        slab.used -= 1
        self.used_bytes -= slab.slot_bytes
        self._free_slot_bytes += slab.slot_bytes
        if slab.used == 0:
            self._free_slot_bytes -= self._slots_bytes(slab.slot_bytes)
            del self._slabs[index]
            self._open[slab.slot_bytes].pop(index, None)
            self._empty.append(index)
            return
        slab.freed.append((offset - index * self.slab_bytes) // slab.slot_bytes)
        self._open[slab.slot_bytes][index] = None

    def slab_of(self, offset: int) -> int:
        """The slab that a slot lies in."""
        return offset // self.slab_bytes

    def _slots_bytes(self, slot_bytes: int) -> int:
        return self.slab_bytes // slot_bytes * slot_bytes
