"""Which blocks a node's store holds, readable by its workers without a call.

A hash table in shared memory: buckets of eight 64-bit words, each word a fingerprint of a block's
key and two bits that name its tiers. A key may stand in either of two buckets; one that finds both
full is left out. The store alone writes, a word at a time; readers take no lock. So an answer is a
hint: it may be stale, and it may miss a block, but what is loaded on its word is checked like
everything else.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trireme.kvcache.block_codec import HASH_BYTES, PAGE_BYTES, BlockKey, block_key, namespace_digest

BUCKET_WORDS = 8
WORD_BYTES = 8
_TIER_BITS = 3
_FILL = 4
"""Set in every fingerprint, so that no word of a block is zero."""
_SPREAD = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
_KEY = struct.Struct("<4Q")
_BUCKET = struct.Struct(f"<{BUCKET_WORDS}Q")
_WORD_AT = struct.Struct("<Q")
_MARK_BITS, _FILL_BIT, _SPREAD_BITS = np.uint64(_WORD - _TIER_BITS), np.uint64(_FILL), np.uint64(_SPREAD)
_HALF, _SHIFT, _DRAM_BIT = np.uint64(32), np.uint64(20), np.uint64(1)


class Tiers(enum.IntFlag):
    """Where a block can be read."""

    NONE = 0
    DRAM = 1
    SSD = 2


def index_words_for(dram_bytes: int, ssd_bytes: int) -> int:
    """Words of a table; a power of two.

    Twice the blocks that fit: in DRAM the smallest there are (a page), on SSD those of 16 KiB; together at
    most a 64th of DRAM, as a large SSD holds larger blocks.
    """
    wanted = 2 * (dram_bytes // PAGE_BYTES + ssd_bytes // 16384)
    bound = max(dram_bytes // 64 // WORD_BYTES, 16 * BUCKET_WORDS)
    words = 16 * BUCKET_WORDS
    while words < wanted and 2 * words <= bound:
        words *= 2
    return words


class ResidencyWriter:
    """The store's side."""

    def __init__(self, words: memoryview) -> None:
        self._memory = words
        self._table: NDArray[np.uint64] = np.frombuffer(words, "<u8").reshape(-1, BUCKET_WORDS)
        self._mask = len(self._table) - 1
        self.left_out = 0
        """Blocks that found no room, since the start."""

    def move(self, keys: Iterable[BlockKey], before: int, after: int) -> None:
        """Blocks that were in these tiers are in those now (`Tiers`, as plain numbers)."""
        if before == after:
            return
        memory, mask, read = self._memory, self._mask, _BUCKET.unpack_from
        for key in keys:
            mark, first, second = _places(key, mask)
            sought = mark | before if before else 0
            for start in (first * _BUCKET.size, second * _BUCKET.size):
                bucket = read(memory, start)
                if sought in bucket:
                    place = start + WORD_BYTES * bucket.index(sought)
                    _WORD_AT.pack_into(memory, place, mark | after if after else 0)
                    break
            else:
                self.left_out += not before

    def fill(self, keys: bytes, tiers: int) -> None:
        """Many blocks (32-byte keys) that were nowhere are in these tiers: as `move`, in bulk."""
        parts = np.frombuffer(keys, "<u8").reshape(-1, 4)  # namespace low, high, hash low, high
        marks, first, second = _places_of(parts[:, 2:] ^ parts[:, :2], self._mask)
        left = np.arange(len(parts))
        for buckets in (first, second):
            left = self._fill_buckets(buckets, marks | np.uint64(tiers), left)
        self.left_out += len(left)

    def _fill_buckets(
        self, buckets: NDArray[np.uint64], words: NDArray[np.uint64], chosen: NDArray[np.intp]
    ) -> NDArray[np.intp]:
        """Put the chosen words into free places of their buckets; those that found none."""
        chosen = chosen[np.argsort(buckets[chosen], kind="stable")]
        targets = buckets[chosen]
        starts = np.searchsorted(targets, targets)
        nth = np.arange(len(targets)) - starts  # place of each among those of its bucket
        free = self._table[targets] == 0  # (blocks, 8)
        fits = free.sum(axis=1) > nth
        wanted = (np.cumsum(free, axis=1) == nth[:, None] + 1) & free
        self._table[targets[fits], wanted[fits].argmax(axis=1)] = words[chosen[fits]]
        rest: NDArray[np.intp] = chosen[~fits]
        return rest


class ResidencyReader:
    """A worker's side."""

    def __init__(self, words: memoryview) -> None:
        self._memory = words
        self._table: NDArray[np.uint64] = np.frombuffer(words, "<u8").reshape(-1, BUCKET_WORDS)
        self._mask = len(self._table) - 1

    def match(self, namespace: str, block_hashes: bytes) -> tuple[int, int]:
        """Leading blocks of a chain (16-byte hashes) that some tier seems to hold, and that DRAM does."""
        digest = namespace_digest(namespace)
        if not block_hashes or not self._has(block_key(digest, block_hashes[:HASH_BYTES])):
            return 0, 0
        low, high = np.frombuffer(digest, "<u8")
        hashes: NDArray[np.uint64] = np.frombuffer(block_hashes, "<u8").reshape(-1, 2)
        marks, first, second = _places_of(hashes ^ np.array((low, high)), self._mask)
        words = np.concatenate((self._table[first], self._table[second]), axis=1)  # (blocks, 16)
        words ^= marks[:, None]
        nearest = words.min(axis=1)  # (blocks,): the tiers where a word is the block's, else larger
        available = _leading(nearest <= _TIER_BITS)
        return available, _leading(nearest[:available] & _DRAM_BIT > 0)

    def _has(self, key: BlockKey) -> bool:
        # A cold prompt misses at its first block: this is the quick way out.
        mark, first, second = _places(key, self._mask)
        for bucket in (first, second):
            if any(
                word ^ mark <= _TIER_BITS for word in _BUCKET.unpack_from(self._memory, bucket * _BUCKET.size)
            ):
                return True
        return False


def _places(key: BlockKey, mask: int) -> tuple[int, int, int]:
    """A block's fingerprint, and the two buckets it may stand in."""
    namespace_low, namespace_high, hash_low, hash_high = _KEY.unpack(key)
    mark = (hash_low ^ namespace_low) & ~_TIER_BITS | _FILL
    first = (hash_high ^ namespace_high) & mask
    return mark, first, (first ^ ((mark >> 32) * _SPREAD & _WORD) >> 20) & mask


def _places_of(
    words: NDArray[np.uint64], mask: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """As `_places`, for many blocks: their hashes' words combined with the namespace's, (blocks, 2)."""
    marks = words[:, 0] & _MARK_BITS | _FILL_BIT
    first = words[:, 1] & np.uint64(mask)
    return marks, first, (first ^ (marks >> _HALF) * _SPREAD_BITS >> _SHIFT) & np.uint64(mask)


def _leading(flags: NDArray[np.bool_]) -> int:
    return len(flags) if flags.all() else int(flags.argmin())
