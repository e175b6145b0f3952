"""KV blocks in host memory: where preempted sequences wait without their device blocks."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from trireme.engine.kv_memory import KvMemory
from trireme.kvcache.block_pool import BlockPool


class HostArena:
    """`num_blocks` blocks, each contiguous in the layout of an exported block.

    Page-locked where the device is a GPU, so that copies need no bounce; ordinary memory where
    the "device" is host memory itself. Complete blocks are found by hash, as on the device: one
    copy serves all sequences that share a prefix, and a sequence that comes back and is swapped
    out again copies only what is new.
    """

    def __init__(self, memory: KvMemory, num_blocks: int) -> None:
        self.blocks = memory.host_blocks(num_blocks)
        self.pool = BlockPool(num_blocks)

    def fill(self, block_ids: Seq[int], blocks: Tensor) -> None:
        """Copy (blocks, *block_shape) from the device into blocks; on a GPU in its stream's order."""
        if blocks.device.type == "cpu":
            self.blocks.index_copy_(0, torch.tensor(block_ids, dtype=torch.int64), blocks)
            return
        for block_id, block in zip(block_ids, blocks, strict=True):
            self.blocks[block_id].copy_(block, non_blocking=True)

    def fetch(self, block_ids: Seq[int], device: torch.device) -> Tensor:
        """A copy of blocks, (blocks, *block_shape), on the device; on a GPU in its stream's order."""
        if device.type == "cpu":
            return self.blocks.index_select(0, torch.tensor(block_ids, dtype=torch.int64))
        fetched = torch.empty(
            (len(block_ids), *self.blocks.shape[1:]), dtype=self.blocks.dtype, device=device
        )
        for place, block_id in enumerate(block_ids):
            fetched[place].copy_(self.blocks[block_id], non_blocking=True)
        return fetched
