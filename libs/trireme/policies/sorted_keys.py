"""Keys in order, with ranks: what an index over a large, changing store needs.

Runs of at most `_RUN` sorted keys; adding, removing and ranking cost O(sqrt n) with the constant of a
memory move, walking from either end costs O(1) per key.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound="tuple[Any, ...]")

_RUN = 512


class SortedKeys(Generic[K]):
    """Distinct tuples in ascending order. Do not change it while walking it."""

    def __init__(self, keys: Iterable[K] = ()) -> None:
        ordered = sorted(keys)
        self._runs = [ordered[start : start + _RUN // 2] for start in range(0, len(ordered), _RUN // 2)]
        self._last = [run[-1] for run in self._runs]
        self._size = len(ordered)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: K) -> bool:
        index = bisect_left(self._last, key)
        if index == len(self._runs):
            return False
        run = self._runs[index]
        return run[bisect_left(run, key)] == key

    def __iter__(self) -> Iterator[K]:
        for run in self._runs:
            yield from run

    def __reversed__(self) -> Iterator[K]:
        for run in reversed(self._runs):
            yield from reversed(run)

    def __getitem__(self, rank: int) -> K:
        """The key with `rank` smaller ones.

        Raises:
            IndexError: there are no more than `rank` keys, or `rank` is negative.
        """
        if rank >= 0:
            for run in self._runs:
                if rank < len(run):
                    return run[rank]
                rank -= len(run)
        raise IndexError(rank)

    def add(self, key: K) -> None:
        """Put in a key that is not there yet."""
        self._size += 1
        if not self._runs:
            self._runs.append([key])
            self._last.append(key)
            return
        index = min(bisect_left(self._last, key), len(self._runs) - 1)
        run = self._runs[index]
        insort(run, key)
        self._last[index] = run[-1]
        if len(run) > _RUN:
            self._runs[index : index + 1] = [run[: _RUN // 2], run[_RUN // 2 :]]
            self._last[index : index + 1] = [run[_RUN // 2 - 1], run[-1]]

    def discard(self, key: K) -> bool:
        """Take a key out; False where it was not there."""
        index = bisect_left(self._last, key)
        if index == len(self._runs):
            return False
        run = self._runs[index]
        position = bisect_left(run, key)
        if run[position] != key:
            return False
        del run[position]
        self._size -= 1
        if run:
            self._last[index] = run[-1]
        else:
            del self._runs[index], self._last[index]
        return True
