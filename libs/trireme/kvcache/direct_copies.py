"""Room and blocks that a worker's own threads copy to and from, piece by piece.

A worker that moves KV layer by layer writes each layer straight into the shared slot, and reads each
layer straight from it; no payload exists a third time. Methods marked so may run in any thread; the
others belong to the client's event loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from trireme.kvcache.arena import Arena, ArenaRef
from trireme.kvcache.arena_copies import CopyFault, is_unchanged, room_for, view_of
from trireme.kvcache.block_codec import payload_checksum
from trireme.wire.kvstore.v1.kvstore_pb2 import RESERVATION_RESERVED, AcquiredBlock, ReservedBlock


class Room:
    """Room for a chain's new blocks. Nothing of it is readable before it is committed.

    Write payloads to `views`, then `seal` each (any thread), then `StoreClient.commit` the room. A writer
    that dies in between leaves nothing: the store takes the room back.
    """

    def __init__(self, arena: Arena, blocks: Sequence[ReservedBlock], sizes: Sequence[int]) -> None:
        self.arena_id = arena.ref.arena_id
        self.present = [block.outcome != RESERVATION_RESERVED for block in blocks]
        """For each block asked for: nothing is to be written, as the store has it or takes none."""
        self.views: list[memoryview | None] = [
            room_for(arena, block, size) if block.outcome == RESERVATION_RESERVED else None
            for block, size in zip(blocks, sizes, strict=True)
        ]
        """For each block asked for: the memory of its payload; None where nothing is to be written."""
        self._arena = arena
        self._blocks = blocks
        self._sums: dict[int, int] = {}

    @property
    def arena(self) -> ArenaRef:
        """Where the room is, for another process to map."""
        return self._arena.ref

    def place(self, index: int) -> ReservedBlock | None:
        """Where in the arena a payload goes; None where nothing is to be written."""
        return None if self.views[index] is None else self._blocks[index]

    def seal(self, index: int, checksum: int | None = None) -> bool:
        """Say that a payload is complete; False where its room was taken back. Any thread.

        Args:
            checksum: the payload's, where the writer has it.
        """
        view, block = self.views[index], self._blocks[index]
        if view is None or room_for(self._arena, block, len(view)) is None:
            return False
        self._sums[block.generation] = payload_checksum(view) if checksum is None else checksum
        return True

    @property
    def sealed(self) -> dict[int, int]:
        """Checksums by generation of what is complete."""
        return dict(self._sums)

    @property
    def unsealed(self) -> list[int]:
        """Generations of room that will not be used."""
        reserved = [block.generation for block in self._blocks if block.outcome == RESERVATION_RESERVED]
        return [generation for generation in reserved if generation not in self._sums]


class HeldChain:
    """The leading blocks of a chain, in place until released or until the lease ends.

    Copy from `views` in any order and thread, then ask `fault` of each block: what was copied is the block's
    payload only where it answers None.
    """

    def __init__(
        self, arena: Arena, blocks: Sequence[AcquiredBlock], lease_id: int, *, ends_s: float
    ) -> None:
        self.arena_id = arena.ref.arena_id
        self.lease_id = lease_id
        self.ends_s = ends_s
        """When the lease ends, as time.monotonic() tells it."""
        views = [view_of(arena, block) for block in blocks]
        count = next((i for i, view in enumerate(views) if view is None), len(views))
        self.views: list[memoryview] = [view for view in views[:count] if view is not None]
        """Payloads, read only; maybe fewer than were asked for."""
        self.corrupt_generations: list[int] = []
        """Blocks that the store is told of when the chain is let go."""
        self._arena = arena
        self._blocks = blocks[:count]

    def __len__(self) -> int:
        return len(self.views)

    @property
    def arena(self) -> ArenaRef:
        """Where the blocks are, for another process to map."""
        return self._arena.ref

    def place(self, index: int) -> AcquiredBlock:
        """Where in the arena a payload is."""
        return self._blocks[index]

    def fault(self, index: int) -> CopyFault | None:
        """Whether a block's bytes were right all the while; None where they were. Any thread."""
        found = is_unchanged(self._arena, self._blocks[index])
        if found is CopyFault.CORRUPT or found is CopyFault.REUSED:
            self.corrupt_generations.append(self._blocks[index].generation)
        return found
