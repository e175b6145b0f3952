"""The table of who holds which blocks, in the form that attention reads."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

_FIRST_ROWS = 16


class BlockTables:
    """A row of block numbers per sequence that holds device blocks, whether it runs or not.

    Rows are made as they are needed: only the number of blocks bounds how many sequences hold some.
    """

    def __init__(self, width: int) -> None:
        self._table = np.zeros((_FIRST_ROWS, width), dtype=np.int64)
        self._free = list(range(_FIRST_ROWS - 1, -1, -1))

    def take(self, blocks: Seq[int]) -> int:
        """A row that begins with these blocks."""
        if not self._free:
            rows = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        row = self._free.pop()
        self._table[row, : len(blocks)] = blocks
        return row

    def extend(self, row: int, held: int, blocks: Seq[int]) -> None:
        """Put blocks behind the `held` ones of a row."""
        self._table[row, held : held + len(blocks)] = blocks

    def give_back(self, row: int) -> None:
        """The row is free."""
        self._free.append(row)

    def read(self, rows: list[int], width: int) -> NDArray[np.int64]:
        """The first `width` blocks of rows, (rows, width); a copy."""
        return self._table[rows, :width]
