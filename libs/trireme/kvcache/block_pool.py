"""The engine's KV blocks: who holds them, which prefixes they are, which to give up next.

A block is in one of three states:

    held    one or more sequences refer to it; it may have a hash (its prefix is complete)
    cached  nobody refers to it, but it has a hash and may be found again; oldest goes first
    free    nobody refers to it and it means nothing

Only blocks with a hash are shared and nobody writes to them again, so there is no copy on
write. Every operation costs O(1) per block. The pool knows numbers, not tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

BlockEvent = Callable[[bytes, int], None]
"""Called with a block's hash and index."""


def _ignore(block_hash: bytes, block_id: int) -> None:
    return None


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    Args:
        num_blocks: how many there are.
        on_cached: a hash became resident in this block.
        on_evicted: a hash stops being resident; its bytes are still in the block during the call.
    """

    def __init__(
        self, num_blocks: int, *, on_cached: BlockEvent = _ignore, on_evicted: BlockEvent = _ignore
    ) -> None:
        self.num_blocks = num_blocks
        self._on_cached = on_cached
        self._on_evicted = on_evicted
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that sequences refer to."""
        return self.num_blocks - self.num_available

    @property
    def num_resident_hashes(self) -> int:
        """Complete blocks that can be found by hash."""
        return len(self._by_hash)

    def refs(self, block_id: int) -> int:
        """Sequences that refer to the block."""
        return self._refs[block_id]

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
        """Add a reference to each; cached ones become held."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._cached[block_id]
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a sequence's reference to its blocks, given in order.

        The tail of a prefix is given up before its head, which more sequences share.
        """
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] > 0:
                continue
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

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

    def forget(self, block_ids: Iterable[int]) -> None:
        """Take away the hashes of these blocks: nobody finds them again."""
        for block_id in block_ids:
            if self._hashes[block_id] is None:
                continue
            self._drop_hash(block_id)
            if self._refs[block_id] == 0:
                del self._cached[block_id]
                self._free.append(block_id)

    def clear(self) -> None:
        """Forget all prefixes."""
        self.forget(list(self._by_hash.values()))

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block_id, _ = self._cached.popitem(last=False)
        self._drop_hash(block_id)
        return block_id

    def _drop_hash(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        self._on_evicted(block_hash, block_id)
        del self._by_hash[block_hash]
        self._hashes[block_id] = None
