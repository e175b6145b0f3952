"""The order in which the lanes of a warp own the elements of a matrix that feeds `mma.m16n8k16`.

A slice is 64 rows by 16 columns; slices run along the columns first. Each of 32 lanes owns 32 elements of a
slice: 4 blocks of 16 rows, in each the 8 elements of its A fragment, by column half, row half and pair.

Source: PTX ISA, matrix fragments for mma.m16n8k16; Xia et al., Quant-LLM, USENIX ATC 2024 (pre-packing).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TILE: Final = 64
"""Rows and columns are padded to multiples of it."""
LANES: Final = 32
SLICE_ROWS: Final = 64
SLICE_COLUMNS: Final = 16

_TO_LANES: Final = (0, 4, 3, 6, 1, 5, 2, 7)
_FROM_LANES: Final = (0, 4, 6, 2, 1, 5, 3, 7)
"""Between (row tile, block, row half, row, column slice, column half, column pair, element) and
(row tile, column slice, row, column pair, block, column half, row half, element)."""


def padded(size: int) -> int:
    """The next multiple of `TILE`."""
    return -(-size // TILE) * TILE


def to_lanes(codes: Tensor, *, fill: int = 0) -> Tensor:
    """Arrange a matrix by owner, with code `fill` where it does not fill its tiles.

    Args:
        codes: (M, K) uint8.
        fill: the code of padding, one of value 0.

    Returns:
        (slices, 32 lanes, 32 elements) uint8; element 8 * block + v is a_v of the lane's fragment.
    """
    rows, columns = codes.shape
    full = torch.nn.functional.pad(codes, (0, padded(columns) - columns, 0, padded(rows) - rows), value=fill)
    split = full.view(padded(rows) // SLICE_ROWS, 4, 2, 8, padded(columns) // SLICE_COLUMNS, 2, 4, 2)
    return split.permute(_TO_LANES).reshape(-1, LANES, 32)


def from_lanes(owned: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `to_lanes`: (M, K) uint8 of `shape`, padding dropped."""
    rows, columns = shape
    split = owned.view(padded(rows) // SLICE_ROWS, padded(columns) // SLICE_COLUMNS, 8, 4, 4, 2, 2, 2)
    full = split.permute(_FROM_LANES).reshape(padded(rows), padded(columns))
    return full[:rows, :columns].contiguous()
