"""The work of each kind of copy, as generators for `KvCopies`: they run on a copy's thread."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trireme.engine.copy_streams import CopyStream
from trireme.engine.host_arena import HostArena
from trireme.engine.kv_copies import Copy, Parts
from trireme.engine.kv_memory import KvMemory, bytes_of
from trireme.engine.stored_blocks import OnSaved, Room, SavedBlock, StoredBlock, is_intact, let_go_of
from trireme.kvcache.block_codec import payload_checksum

_GROUP_BLOCKS = 16
"""Blocks per part of a swap: bounds the memory between the two ends and the wait for a cancel."""


def swap_out(memory: KvMemory, blocks: Seq[int], arena: HostArena, host_blocks: Seq[int]) -> Parts:
    """Device blocks into host blocks, in groups."""

    def parts(stream: CopyStream) -> Generator[int, None, None]:
        for start in range(0, len(blocks), _GROUP_BLOCKS):
            group = slice(start, start + _GROUP_BLOCKS)
            arena.fill(host_blocks[group], memory.gather(blocks[group]))
            yield len(blocks[group]) * memory.block_bytes

    return parts


def swap_in(arena: HostArena, host_blocks: Seq[int], memory: KvMemory, blocks: Seq[int]) -> Parts:
    """Host blocks into device blocks, in groups."""

    def parts(stream: CopyStream) -> Generator[int, None, None]:
        for start in range(0, len(blocks), _GROUP_BLOCKS):
            group = slice(start, start + _GROUP_BLOCKS)
            memory.scatter(blocks[group], arena.fetch(host_blocks[group], memory.device))
            yield len(blocks[group]) * memory.block_bytes

    return parts


@dataclass(slots=True, eq=False)
class Load:
    """Stored blocks on their way to the device, layer by layer, for a sequence that waits for its turn."""

    stored: tuple[StoredBlock, ...]
    blocks: list[int]
    """Device blocks, one for each."""
    hashes: list[bytes]
    held: list[bytes]
    """Hashes of the blocks that the sequence holds beside these, which were resident."""
    layers_needed: int
    """Layers that must be there before the sequence may run."""
    is_of_prefix: bool = True
    """They follow those in `held`; else they are kept under their own names, and the sequence begins from
    them when all are there."""
    num_intact: int | None = None
    """Leading blocks whose payloads are good; None: not known yet. Only these are copied."""
    is_joined: bool = False
    """The sequence runs; it waits for each layer just before it computes it."""
    copy: Copy = field(init=False)

    @property
    def is_admissible(self) -> bool:
        """The payloads are checked and enough layers are there."""
        if not self.is_of_prefix:
            return False
        return self.copy.is_complete or len(self.copy.marks) > self.layers_needed

    @staticmethod
    def part_of_layer(layer: int) -> int:
        """Part 0 checks the payloads, part 1 + i brings layer i."""
        return 1 + layer

    def parts(self, memory: KvMemory) -> Parts:
        """Take private copies of the payloads, check those, then copy layer by layer to the device."""

        def run(stream: CopyStream) -> Generator[int, None, None]:
            try:
                staged = memory.host_layers(len(self.stored))
                private = torch.empty(memory.block_shape, dtype=memory.dtype)
                intact = 0
                for block in self.stored:
                    if not _stage(block, bytes_of(private)):
                        break
                    staged[:, intact].copy_(private)
                    intact += 1
            finally:
                stored, self.stored = self.stored, ()
                let_go_of(stored)
            self.num_intact = intact
            yield 0
            index = torch.tensor(self.blocks[:intact], dtype=torch.int64, device=memory.device)
            for layer in range(memory.num_layers):
                rows = staged[layer, :intact]
                memory.scatter_layer(layer, index, rows.to(memory.device, non_blocking=True))
                yield rows.nbytes

        return run


def _stage(block: StoredBlock, private: NDArray[np.uint8]) -> bool:
    view = memoryview(block.payload)
    if view.nbytes != private.nbytes:
        return False
    private[:] = np.frombuffer(view, dtype=np.uint8)
    if is_intact(private.data, block.checksum):
        return True
    if block.on_corrupt is not None:
        block.on_corrupt()
    return False


class OnceSaved:
    """Passes the first report on and no other."""

    def __init__(self, on_saved: OnSaved) -> None:
        self._on_saved: OnSaved | None = on_saved

    def __call__(self, saved: tuple[SavedBlock, ...]) -> None:
        on_saved, self._on_saved = self._on_saved, None
        if on_saved is not None:
            on_saved(saved)


def save(
    memory: KvMemory, blocks: Seq[int], hashes: Seq[bytes], room_for: Room | None, on_saved: OnSaved
) -> Parts:
    """Device blocks into rooms of a lower tier, layer by layer; then each block's bytes in one go."""

    def parts(stream: CopyStream) -> Generator[int, None, None]:
        saved: list[SavedBlock] = []
        try:
            staged = memory.host_layers(len(blocks))
            index = torch.tensor(blocks, dtype=torch.int64, device=memory.device)
            for layer in range(memory.num_layers):
                rows = memory.gather_layer(layer, index)
                staged[layer].copy_(rows, non_blocking=True)
                if layer == memory.num_layers - 1:
                    stream.synchronize()
                yield rows.nbytes
            for place, block_hash in enumerate(hashes):
                room = _room(block_hash, memory.block_bytes, room_for)
                if room is not None:
                    blocks_view = torch.frombuffer(room, dtype=memory.dtype).view(memory.block_shape)
                    blocks_view.copy_(staged[:, place])
                    saved.append(SavedBlock(block_hash, room, payload_checksum(room)))
        finally:
            on_saved(tuple(saved))

    return parts


def _room(block_hash: bytes, num_bytes: int, room_for: Room | None) -> memoryview | None:
    room = memoryview(bytearray(num_bytes)) if room_for is None else room_for(block_hash)
    return room.cast("B") if room is not None and room.nbytes == num_bytes else None
