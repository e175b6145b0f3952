"""What the engine and the tiers below it know of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class KvTier(Protocol):
    """A lower tier of the KV cache, such as a kvstore. Called on the engine's thread: never waits."""

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of `hashes` it holds. The worker asks, before it adds a sequence."""

    def on_cached(self, block_hash: bytes) -> None:
        """The block is complete and resident in the engine."""

    def on_evicted(self, block_hash: bytes, export: Callable[[], bytes]) -> None:
        """The block is about to leave the engine; `export` gives its bytes during this call only."""

    def on_cut(self, sequence_id: str, hashes: Sequence[bytes]) -> None:
        """The complete blocks of a sequence that was cut here: not those that its request's chain names."""
