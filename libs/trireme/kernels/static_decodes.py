"""A decode batch whose tensors stay where they are while what they hold changes: what a graph replays on.

Nothing of a step is known to the host code that runs on it but how many rows there are and how wide their
block tables: contexts, blocks and slots are read from the tensors, on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_transfers import Parcel


class StaticDecodes(AttentionBatch):
    """`rows` sequences of one query each; those that a step does not need are padding.

    Padding computes, so that shapes stay: token 0 at position 0, a context of one. Its keys and values go to
    slots of its own in spare blocks that no sequence holds.

    Args:
        width: blocks of a row of the block tables.
        block_size: tokens per block.
        spare_block: first of `spare_blocks(rows)` blocks for padding.
        device, dtype: of the queries.
    """

    __slots__ = ("_parcel", "_spare_block", "_tiles", "positions", "sequences", "tables", "tokens", "width")

    def __init__(
        self,
        *,
        rows: int,
        width: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            query_lens=(1,) * rows,
            # What it may be at most; what it is stands in `sequences`.
            context_lens=(width * block_size,) * rows,
            block_tables=np.zeros((rows, width), dtype=np.int64),
            block_size=block_size,
            device=device,
            dtype=dtype,
        )
        self.width = width
        self._spare_block = spare_block
        self._parcel = Parcel(self._arrays([], [], np.zeros((0, 0), dtype=np.int64)), device)
        self.tokens: Tensor = self._parcel.tensors["tokens"]
        """(rows,) int64."""
        self.positions: Tensor = self._parcel.tensors["positions"]
        """(rows,) int64."""
        self.slots = self._parcel.tensors["slots"]
        self.sequences: Tensor = self._parcel.tensors["sequences"]
        """(rows, 3) int32: first token, tokens in this step, tokens in the cache."""
        self.tables: Tensor = self._parcel.tensors["tables"]
        """(rows, width) int32: blocks."""
        self._tiles: dict[int, Tensor] = {}

    def fill(self, tokens: list[int], positions: list[int], block_tables: NDArray[np.int64]) -> None:
        """Hold another step, in one copy that does not hold up the host.

        Args:
            tokens, positions: of its sequences, at most `rows`.
            block_tables: (sequences, up to `width`): the blocks of each, in order.
        """
        self._parcel.refill(self._arrays(tokens, positions, block_tables))

    def tiles(self, rows_of_tile: int, heads_per_key: int) -> Tensor:
        """(tiles, 2) int32: sequence and first row of each tile of queries; made once."""
        found = self._tiles.get(heads_per_key)
        if found is None:
            count = len(self.query_lens)
            tiles = [(row, first) for row in range(count) for first in range(0, heads_per_key, rows_of_tile)]
            found = self._tiles[heads_per_key] = torch.tensor(tiles, dtype=torch.int32).to(self.device)
        return found

    def _arrays(
        self, tokens: list[int], positions: list[int], block_tables: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        rows, size, count = len(self.query_lens), self.block_size, len(tokens)
        padded = np.zeros((2, rows), dtype=np.int64)
        padded[:, :count] = tokens, positions
        tables = np.zeros((rows, self.width), dtype=np.int32)
        tables[:count, : block_tables.shape[1]] = block_tables
        tables[count:, 0] = self._spare_block
        slots = self._spare_block * size + np.arange(rows, dtype=np.int64)
        last = padded[1, :count]
        slots[:count] = block_tables[np.arange(count), last // size] * size + last % size
        sequences = np.ones((rows, 3), dtype=np.int32)
        sequences[:, 0] = np.arange(rows)
        sequences[:, 2] = padded[1] + 1
        return {
            "tokens": padded[0],
            "positions": padded[1],
            "slots": slots,
            "sequences": sequences,
            "tables": tables,
        }


def spare_blocks(rows: int, block_size: int) -> int:
    """Blocks that the padding of a batch of `rows` needs."""
    return -(-rows // block_size)
