"""The slots of the arena: which block lies where, who uses it, and who is writing.

Single-threaded and without a clock: the time is passed in. It knows no order of eviction; its owner
decides which blocks go. A slot with a pin is never given away: a dropped block keeps it until the
last lease or copy ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    BlockKey,
    payload_of,
    wipe_header,
    write_generation,
    write_header,
)
from trireme.kvcache.slab_allocator import SlabAllocator
from trireme.kvcache.stored_blocks import NOWHERE, Block


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks that stay in place for a reader."""

    lease_id: int
    expires_s: float
    blocks: dict[BlockKey, Block] = field(default_factory=dict)


class Reservation(NamedTuple):
    """Room for a block that someone writes."""

    block: Block
    tenant: str
    expires_s: float


class DramTier:
    """Slots, leases and reservations of one arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._allocator = SlabAllocator(num_slabs=arena.num_slabs, slab_bytes=arena.slab_bytes)
        self._owners: dict[int, dict[int, Block]] = {}
        """Blocks with a slot, by slab and offset."""
        self._reserved: dict[int, Reservation] = {}
        self._reserved_keys: set[BlockKey] = set()
        self._leases: dict[int, Lease] = {}
        self._last_generation = 0
        self._last_lease = 0
        self.expired = 0
        """Leases and reservations that ended by their time."""

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.num_slabs * self._allocator.slab_bytes

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    @property
    def free_bytes(self) -> int:
        """What slots like those in use can still take; less than the rest, which slots leave over."""
        return self._allocator.free_bytes

    @property
    def largest_slot_bytes(self) -> int:
        """No block's image can be larger."""
        return self._allocator.slab_bytes

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def is_being_written(self, key: BlockKey) -> bool:
        """Whether room is reserved for the block."""
        return key in self._reserved_keys

    def place(self, block: Block) -> bool:
        """Give a block a slot, with a new generation and no readable header; False where none is free."""
        offset = self._allocator.allocate(block.image_bytes)
        if offset is None:
            return False
        self._last_generation += 1
        block.offset, block.generation = offset, self._last_generation
        self._owners.setdefault(self._allocator.slab_of(offset), {})[offset] = block
        at = self._arena.file_offset(offset)
        wipe_header(self._arena.memory, at=at)
        write_generation(self._arena.memory, block.generation, at=at)
        return True

    def displace(self, block: Block) -> None:
        """Take a block's slot away; a reader that outlived its lease sees that at once."""
        assert not block.pins
        write_generation(self._arena.memory, 0, at=self._arena.file_offset(block.offset))
        slab = self._allocator.slab_of(block.offset)
        owners = self._owners[slab]
        del owners[block.offset]
        if not owners:
            del self._owners[slab]
        self._allocator.free(block.offset)
        block.offset, block.generation = NOWHERE, 0

    def slab_of(self, block: Block) -> int:
        """The slab that a block's slot lies in."""
        return self._allocator.slab_of(block.offset)

    def slab_mates(self, block: Block) -> list[Block]:
        """All blocks of a block's slab: when they go, the slab can serve another slot size."""
        return list(self._owners[self._allocator.slab_of(block.offset)].values())

    def reserve(self, block: Block, *, tenant: str, expires_s: float) -> None:
        """Note that someone writes a placed block."""
        self._reserved[block.generation] = Reservation(block, tenant, expires_s)
        self._reserved_keys.add(block.key)

    def end_reservation(self, generation: int) -> Reservation | None:
        """The reservation of this generation, which is one no longer; None where it ended before."""
        reservation = self._reserved.pop(generation, None)
        if reservation is not None:
            self._reserved_keys.discard(reservation.block.key)
        return reservation

    def seal(self, block: Block, *, position: int) -> None:
        """Write the header of a block whose payload is in place."""
        write_header(
            self._arena.memory,
            block.header(position=position),
            generation=block.generation,
            at=self._arena.file_offset(block.offset),
        )

    def open_lease(self, *, expires_s: float) -> Lease:
        """A lease on nothing yet."""
        self._last_lease += 1
        lease = Lease(self._last_lease, expires_s)
        self._leases[lease.lease_id] = lease
        return lease

    def holds(self, lease: Lease) -> bool:
        """Whether the lease has not ended."""
        return lease.lease_id in self._leases

    def end_lease(self, lease_id: int) -> Lease | None:
        """The lease, which is one no longer; None where it ended before. Its blocks are still pinned."""
        return self._leases.pop(lease_id, None)

    def unpin(self, block: Block) -> None:
        """One lease or copy less; a dropped block gives its slot back with the last one."""
        block.pins -= 1
        if block.run is None and not block.pins:
            self.displace(block)

    def outlived(self, now_s: float) -> tuple[list[int], list[int]]:
        """Leases and generations of reservations whose time is over: their holder is slow or dead."""
        leases = [lease.lease_id for lease in self._leases.values() if lease.expires_s <= now_s]
        generations = [key for key, each in self._reserved.items() if each.expires_s <= now_s]
        return leases, generations

    def payload_offset(self, block: Block) -> int:
        """Where a block's payload lies: bytes from the beginning of the arena's file."""
        return self._arena.file_offset(block.offset) + HEADER_BYTES

    def image(self, block: Block) -> memoryview:
        """A block's memory: header, payload and padding."""
        return self._arena.image(block.offset, block.image_bytes)

    def payload(self, block: Block) -> memoryview:
        """A block's payload."""
        return payload_of(self.image(block), block.payload_bytes)

    def images(self, blocks: Iterable[Block]) -> list[memoryview]:
        """The memory of several blocks."""
        return [self.image(block) for block in blocks]
