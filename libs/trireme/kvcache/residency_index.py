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

import numpy as np
from numpy.typing import NDArray

from trireme.kvcache.block_codec import HASH_BYTES, BlockKey, block_key, namespace_digest

BUCKET_WORDS = 8
WORD_BYTES = 8
_TIER_BITS = 3
_FILL = 4
"""Set in every fingerprint, so that no word of a block is zero."""
_SPREAD = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
_KEY = struct.Struct("<4Q")
_MARK_BITS, _FILL_BIT, _SPREAD_BITS = np.uint64(_WORD - _TIER_BITS), np.uint64(_FILL), np.uint64(_SPREAD)
_HALF, _SHIFT, _DRAM_BIT = np.uint64(32), np.uint64(20), np.uint64(1)


class Tiers(enum.IntFlag):
    """Where a block can be read."""

    NONE = 0
    DRAM = 1
    SSD = 2


def index_words_for(dram_bytes: int, ssd_bytes: int) -> int:
    """Words of a table with room for twice the blocks of 16 KiB, at most a 32nd of DRAM; a power of two."""
    wanted = 2 * (dram_bytes + ssd_bytes) // 16384
    bound = max(dram_bytes // 32 // WORD_BYTES, 16 * BUCKET_WORDS)
    words = 16 * BUCKET_WORDS
    while words < wanted and 2 * words <= bound:
        words *= 2
    return words


class ResidencyWriter:
    """The store's side."""

    def __init__(self, words: memoryview) -> None:
        self._words = words.cast("Q")
        self._mask = len(self._words) // BUCKET_WORDS - 1
        self.left_out = 0
        """Blocks that found no room, since the start."""

    def move(self, key: BlockKey, before: int, after: int) -> None:
        """A block that was in these tiers is in those now (`Tiers`, as plain numbers)."""
        if before == after:
            return
        mark, first, second = _places(key, self._mask)
        sought = mark | before if before else 0
        words = self._words
        for start in (first * BUCKET_WORDS, second * BUCKET_WORDS):
            bucket = words[start : start + BUCKET_WORDS].tolist()
            if sought in bucket:
                words[start + bucket.index(sought)] = mark | after if after else 0
                return
        self.left_out += not before


class ResidencyReader:
    """A worker's side."""

    def __init__(self, words: memoryview) -> None:
        self._words = words.cast("Q")
        self._table: NDArray[np.uint64] = np.frombuffer(words, "<u8").reshape(-1, BUCKET_WORDS)
        self._mask = len(self._table) - 1

    def match(self, namespace: str, block_hashes: bytes) -> tuple[int, int]:
        """Leading blocks of a chain (16-byte hashes) that some tier seems to hold, and that DRAM does."""
        digest = namespace_digest(namespace)
        if not block_hashes or not self._has(block_key(digest, block_hashes[:HASH_BYTES])):
            return 0, 0
        low, high = np.frombuffer(digest, "<u8")
        hashes: NDArray[np.uint64] = np.frombuffer(block_hashes, "<u8").reshape(-1, 2)
        marks = (hashes[:, 0] ^ low) & _MARK_BITS | _FILL_BIT
        first = (hashes[:, 1] ^ high) & np.uint64(self._mask)
        second = (first ^ (marks >> _HALF) * _SPREAD_BITS >> _SHIFT) & np.uint64(self._mask)
        words = np.concatenate((self._table[first], self._table[second]), axis=1)  # (blocks, 16)
        words ^= marks[:, None]
        nearest = words.min(axis=1)  # (blocks,): the tiers where a word is the block's, else larger
        available = _leading(nearest <= _TIER_BITS)
        return available, _leading(nearest[:available] & _DRAM_BIT > 0)

    def _has(self, key: BlockKey) -> bool:
        # A cold prompt misses at its first block: this is the quick way out.
        mark, first, second = _places(key, self._mask)
        for start in (first * BUCKET_WORDS, second * BUCKET_WORDS):
            if any(word ^ mark <= _TIER_BITS for word in self._words[start : start + BUCKET_WORDS].tolist()):
                return True
        return False


def _places(key: BlockKey, mask: int) -> tuple[int, int, int]:
    """A block's fingerprint, and the two buckets it may stand in."""
    namespace_low, namespace_high, hash_low, hash_high = _KEY.unpack(key)
    mark = (hash_low ^ namespace_low) & ~_TIER_BITS | _FILL
    first = (hash_high ^ namespace_high) & mask
    return mark, first, (first ^ ((mark >> 32) * _SPREAD & _WORD) >> 20) & mask


def _leading(flags: NDArray[np.bool_]) -> int:
    return len(flags) if flags.all() else int(flags.argmin())
