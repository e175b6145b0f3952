"""Which worker holds which prefix blocks, as told by the workers.

Pure bookkeeping: facts go in, a longest-prefix length comes out. Hashes are chained, so
a block that is held says that its content follows the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Holder = tuple[str, str]
"""(worker_id, variant)"""


class PrefixIndex:
    """Blocks by holder. All operations are linear in the blocks named."""

    def __init__(self) -> None:
        self._held: dict[Holder, set[bytes]] = {}

    def reset(self, holder: Holder) -> None:
        """Forget what the holder held: it started anew."""
        self._held[holder] = set()

    def add(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        """The holder holds these blocks too."""
        self._held.setdefault(holder, set()).update(hashes)

    def remove(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        """The holder no longer holds these blocks."""
        self._held.get(holder, set()).difference_update(hashes)

    def keep_only(self, worker_ids: Iterable[str]) -> None:
        """Forget workers that are gone."""
        living = set(worker_ids)
        self._held = {holder: held for holder, held in self._held.items() if holder[0] in living}

    def leading_blocks(self, holder: Holder, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` the holder holds without a gap."""
        held = self._held.get(holder)
        if not held:
            return 0
        for position, block in enumerate(hashes):
            if block not in held:
                return position
        return len(hashes)


def split_hashes(joined: bytes, *, size: int = 16) -> list[bytes]:
    """Hashes of `size` bytes from their concatenation."""
    return [joined[start : start + size] for start in range(0, len(joined), size)]
