"""The blocks in the arena: where each lies, who uses it, and which goes first.

Single-threaded and without a clock: the time is passed in. A slot is in one of three
states: reserved (being written, not readable), resident (readable), or dead (no longer
found, kept until its last lease ends). A leased or reserved slot is never given away.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    BlockHeader,
    BlockKey,
    image_bytes,
    payload_of,
    write_generation,
    write_header,
)
from trireme.kvcache.slab_allocator import SlabAllocator


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one block."""

    offset: int
    """From the beginning of the arena's slots."""
    header: BlockHeader
    generation: int
    pins: int = 0
    dead: bool = False

    @property
    def image_bytes(self) -> int:
        return image_bytes(self.header.payload_bytes)


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks that stay in place for a reader."""

    lease_id: int
    expires_s: float
    slots: dict[BlockKey, Slot] = field(default_factory=dict)


OnEvict = Callable[[Slot, memoryview], None]
"""Sees a slot and its image just before the room is given away."""


class DramTier:
    """Blocks in one arena, put out in order of last use."""

    def __init__(self, arena: Arena, *, on_evict: OnEvict) -> None:
        self._arena = arena
        self._on_evict = on_evict
        self._allocator = SlabAllocator(num_slabs=arena.num_slabs, slab_bytes=arena.slab_bytes)
        self._resident: OrderedDict[BlockKey, Slot] = OrderedDict()
        """Oldest use first."""
        self._by_slab: dict[int, dict[BlockKey, Slot]] = {}
        self._reserved: dict[int, tuple[Slot, float]] = {}
        self._reserved_keys: set[BlockKey] = set()
        self._leases: dict[int, Lease] = {}
        self._last_generation = 0
        self._last_lease = 0
        self.tenant_bytes: Counter[str] = Counter()
        self.evictions = 0
        self.expired = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.num_slabs * self._allocator.slab_bytes

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def is_being_written(self, key: BlockKey) -> bool:
        """Whether room is reserved for the block."""
        return key in self._reserved_keys

    def reserve(self, header: BlockHeader, *, expires_s: float) -> Slot | None:
        """Room for a block that is neither here nor being written; None where none can be made."""
        slot_bytes = image_bytes(header.payload_bytes)
        offset = self._allocator.allocate(slot_bytes)
        while offset is None:
            if not self._make_room(slot_bytes):
                return None
            offset = self._allocator.allocate(slot_bytes)
        self._last_generation += 1
        slot = Slot(offset, header, self._last_generation)
        write_header(self._image(slot), header, generation=slot.generation)
        self._reserved[slot.generation] = (slot, expires_s)
        self._reserved_keys.add(header.key)
        return slot

    def commit(self, generation: int) -> Slot | None:
        """Make a reserved block readable, as the one used last; None where the reservation ended."""
        slot, _ = self._reserved.pop(generation, (None, 0.0))
        if slot is None:
            return None
        key = slot.header.key
        self._reserved_keys.discard(key)
        self._resident[key] = slot
        self._by_slab.setdefault(self._allocator.slab_of(slot.offset), {})[key] = slot
        self.tenant_bytes[slot.header.tenant] += slot.image_bytes
        return slot

    def abort(self, generation: int) -> bool:
        """Give reserved room back; False where the reservation ended."""
        slot, _ = self._reserved.pop(generation, (None, 0.0))
        if slot is None:
            return False
        self._reserved_keys.discard(slot.header.key)
        self._free(slot)
        return True

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Note a use of a chain, given first block first; its end will go before its beginning."""
        for key in reversed(keys):
            if key in self._resident:
                self._resident.move_to_end(key)

    def open_lease(self, *, expires_s: float) -> Lease:
        """A lease on nothing yet."""
        self._last_lease += 1
        lease = Lease(self._last_lease, expires_s)
        self._leases[lease.lease_id] = lease
        return lease

    def pin(self, lease: Lease, key: BlockKey) -> Slot | None:
        """Put a block under a lease; None where it is not here or the lease has ended."""
        slot = self._resident.get(key)
        if slot is None or lease.lease_id not in self._leases:
            return None
        if key not in lease.slots:
            slot.pins += 1
            lease.slots[key] = slot
        return slot

    def unpin(self, lease: Lease, key: BlockKey) -> None:
        """Take one block out of a lease."""
        self._unpin(lease.slots.pop(key))

    def release(self, lease_id: int, *, corrupt_generations: Iterable[int] = ()) -> tuple[bool, int]:
        """End a lease and drop those of its blocks that were found corrupt.

        Returns whether it was held, and the number of blocks dropped.
        """
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False, 0
        corrupt = set(corrupt_generations)
        dropped = 0
        for slot in lease.slots.values():
            if slot.generation in corrupt and not slot.dead:
                self._forget(slot)
                slot.dead = True
                dropped += 1
            self._unpin(slot)
        return True, dropped

    def expire(self, now_s: float) -> None:
        """End the leases and reservations whose time is over: their holder is slow or dead."""
        leases = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        generations = [key for key, (_, expires_s) in self._reserved.items() if expires_s <= now_s]
        for lease in leases:
            self.release(lease.lease_id)
        for generation in generations:
            self.abort(generation)
        self.expired += len(leases) + len(generations)

    def payload_offset(self, slot: Slot) -> int:
        """Where a slot's payload lies: bytes from the beginning of the arena's file."""
        return self._arena.file_offset(slot.offset) + HEADER_BYTES

    def image(self, slot: Slot) -> memoryview:
        """A slot's memory: header, payload and padding."""
        return self._image(slot)

    def payload(self, slot: Slot) -> memoryview:
        """A slot's payload."""
        return payload_of(self._image(slot), slot.header.payload_bytes)

    def oldest_first(self) -> list[Slot]:
        """All readable blocks, in order of last use."""
        return list(self._resident.values())

    def _image(self, slot: Slot) -> memoryview:
        return self._arena.image(slot.offset, slot.image_bytes)

    def _make_room(self, slot_bytes: int) -> bool:
        # The oldest block goes. If its slot has another size, freeing it alone helps nobody:
        # then the whole slab around it goes, so that memory follows use between slot sizes.
        if slot_bytes > self._allocator.slab_bytes:
            return False
        held_slabs: set[int] = set()
        for slot in self._resident.values():
            if slot.pins:
                continue
            if slot.image_bytes == slot_bytes:
                victims = [slot]
                break
            slab = self._allocator.slab_of(slot.offset)
            if slab not in held_slabs and (victims := self._whole_slab(slab)):
                break
            held_slabs.add(slab)
        else:
            return False
        for victim in victims:
            self._on_evict(victim, self._image(victim))
            self._forget(victim)
            self._free(victim)
            self.evictions += 1
        return True

    def _whole_slab(self, slab: int) -> list[Slot]:
        slots = [other for other in self._by_slab[slab].values() if not other.pins]
        return slots if len(slots) == self._allocator.slots_used(slab) else []

    def _unpin(self, slot: Slot) -> None:
        slot.pins -= 1
        if slot.dead and slot.pins == 0:
            self._free(slot)

    def _forget(self, slot: Slot) -> None:
        key = slot.header.key
        del self._resident[key]
        slab = self._allocator.slab_of(slot.offset)
        del self._by_slab[slab][key]
        if not self._by_slab[slab]:
            del self._by_slab[slab]
        self.tenant_bytes[slot.header.tenant] -= slot.image_bytes
        if not self.tenant_bytes[slot.header.tenant]:
            del self.tenant_bytes[slot.header.tenant]

    def _free(self, slot: Slot) -> None:
        # A reader that outlived its lease sees at once that the slot is no longer its block.
        write_generation(self._image(slot), 0)
        self._allocator.free(slot.offset)
