"""Blocks of KV memory: who holds them, which prefixes they are, which to give up next.

A block is in one of four states, so free + cached + draining + held = num_blocks:

    held      one or more sequences refer to it; it may have a hash (its prefix is complete)
    draining  nobody refers to it, but a copy that was issued still reads or writes it
    cached    nobody refers to it, but it has a hash and may be found again
    free      nobody refers to it and it means nothing

Only blocks with a hash are shared and nobody writes to them again, so there is no copy on
write. A draining block is never given out: whoever writes to a block need not ask who still
reads it. Cached blocks leave in the order of their next use: those of which no next use is
known go first, least recently used first; then those whose next use is farthest away. The pool
knows numbers, not tensors; operations cost O(1) per block, O(log n) where a next use is known.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

BlockEvent = Callable[[bytes, int], None]
"""Called with a block's hash and index."""


def _ignore(block_hash: bytes, block_id: int) -> None:
    return None


def _unknown(block_hash: bytes) -> float:
    return math.inf


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    Args:
        num_blocks: how many there are.
        on_cached: a hash became resident in this block.
        on_evicted: a hash stops being resident; its bytes are still in the block during the call.
        next_use_s: when a block that becomes cached is expected to be used, in seconds on any
            clock that all answers share; infinity: nobody knows. Default: least recently used.
            An attribute too, for an owner that comes later.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        on_cached: BlockEvent = _ignore,
        on_evicted: BlockEvent = _ignore,
        next_use_s: Callable[[bytes], float] = _unknown,
    ) -> None:
        self.num_blocks = num_blocks
        self._on_cached = on_cached
        self._on_evicted = on_evicted
        self.next_use_s = next_use_s
        self._refs = [0] * num_blocks
        self._copies = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._draining: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Those without a known next use, least recently used first."""
        self._told: dict[int, float] = {}
        """Next uses from `set_next_use`, of blocks that were not used since."""
        self._awaited: dict[int, float] = {}
        """Cached ones with a known next use."""
        self._farthest: list[tuple[float, int]] = []
        """(-next use, block), a heap; an entry that `_awaited` does not confirm is stale."""
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + self.num_cached

    @property
    def num_free(self) -> int:
        """Blocks that mean nothing and that no copy touches."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and that may be found again."""
        return len(self._cached) + len(self._awaited)

    @property
    def num_draining(self) -> int:
        """Blocks that nobody refers to and that a copy still touches."""
        return len(self._draining)

    @property
    def num_held(self) -> int:
        """Blocks that sequences refer to."""
        return self.num_blocks - self.num_available - len(self._draining)

    @property
    def num_resident_hashes(self) -> int:
        """Complete blocks that can be found by hash."""
        return len(self._by_hash)

    def refs(self, block_id: int) -> int:
        """Sequences that refer to the block."""
        return self._refs[block_id]

    def is_copied(self, block_id: int) -> bool:
        """A copy that was issued still reads or writes the block."""
        return self._copies[block_id] > 0

    def hash_of(self, block_id: int) -> bytes | None:
        """The block's hash, if its prefix is complete and it is the one that stands for it."""
        return self._hashes[block_id]

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this prefix."""
        return self._by_hash.get(block_hash)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest resident prefix of `hashes`; takes no reference."""
        blocks: list[int] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each; None, and nothing taken, if there are fewer."""
        if count > self.num_available:
            return None
        taken = [self._take() for _ in range(count)]
        for block_id in taken:
            self._refs[block_id] = 1
        return taken

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each; cached and draining ones become held."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                self._leave(block_id)
                self._told.pop(block_id, None)
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a sequence's reference to its blocks, given in order.

        The tail of a prefix is given up before its head, which more sequences share.
        """
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._settle(block_id)

    def begin_copy(self, block_ids: Iterable[int]) -> None:
        """A copy that reads or writes these blocks, held or cached, was issued."""
        for block_id in block_ids:
            if self._refs[block_id] == 0 and self._copies[block_id] == 0:
                self._leave(block_id)
                self._draining.add(block_id)
            self._copies[block_id] += 1

    def end_copy(self, block_ids: Sequence[int]) -> None:
        """The copy completed; blocks are given in order, as to `release`."""
        for block_id in reversed(block_ids):
            self._copies[block_id] -= 1
            if self._copies[block_id] == 0 and self._refs[block_id] == 0:
                self._draining.remove(block_id)
                self._settle(block_id)

    def cache(self, block_id: int, block_hash: bytes) -> bool:
        """Say that a held block is complete and what it holds.

        False, and the block stays private, if another block stands for this hash already.
        """
        if block_hash in self._by_hash:
            return False
        self._by_hash[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._on_cached(block_hash, block_id)
        return True

    def set_next_use(self, block_hash: bytes, next_use_s: float) -> None:
        """When a block is next used, in place of what `next_use_s` says; nothing if it is not here.

        It holds until somebody uses the block. Infinity: nobody knows.
        """
        block_id = self._by_hash.get(block_hash)
        if block_id is None:
            return
        self._told[block_id] = next_use_s
        if block_id in self._cached or block_id in self._awaited:
            self._leave(block_id)
            self._enter(block_id, next_use_s)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Take away the hashes of these blocks: nobody finds them again."""
        for block_id in block_ids:
            if self._hashes[block_id] is None:
                continue
            self._drop_hash(block_id)
            if self._refs[block_id] == 0 and self._copies[block_id] == 0:
                self._leave(block_id)
                self._free.append(block_id)

    def clear(self) -> None:
        """Forget all prefixes."""
        self.forget(list(self._by_hash.values()))

    def _settle(self, block_id: int) -> None:
        """Nobody refers to the block any more."""
        block_hash = self._hashes[block_id]
        if self._copies[block_id]:
            self._draining.add(block_id)
        elif block_hash is None:
            self._free.append(block_id)
        else:
            told = self._told.get(block_id)
            self._enter(block_id, self.next_use_s(block_hash) if told is None else told)

    def _enter(self, block_id: int, next_use_s: float) -> None:
        if next_use_s == math.inf:
            self._cached[block_id] = None
            return
        self._awaited[block_id] = next_use_s
        heapq.heappush(self._farthest, (-next_use_s, block_id))
        if len(self._farthest) > 64 + 2 * len(self._awaited):
            self._farthest = [(-at, awaited) for awaited, at in self._awaited.items()]
            heapq.heapify(self._farthest)

    def _leave(self, block_id: int) -> None:
        """Out of the cached or the draining ones."""
        if block_id in self._cached:
            del self._cached[block_id]
        elif self._awaited.pop(block_id, None) is None:
            self._draining.remove(block_id)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._cached:
            block_id, _ = self._cached.popitem(last=False)
        else:
            while True:
                negated, block_id = heapq.heappop(self._farthest)
                if self._awaited.get(block_id) == -negated:
                    break
            del self._awaited[block_id]
        self._drop_hash(block_id)
        return block_id

    def _drop_hash(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        self._on_evicted(block_hash, block_id)
        del self._by_hash[block_hash]
        self._told.pop(block_id, None)
        self._hashes[block_id] = None
