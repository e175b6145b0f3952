"""Which worker holds which prefix blocks, as told by the workers.

Pure bookkeeping: facts go in, a longest-prefix length comes out. Hashes are chained, so
a block that is held says that its content follows the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Holder = tuple[str, str]
"""(worker_id, variant)"""

MAX_EXPECTED = 65_536
"""Blocks expected of one holder; the oldest are forgotten first."""


class PrefixIndex:
    """Blocks by holder: told of, and expected. All operations are linear in the blocks named."""

    def __init__(self) -> None:
        self._held: dict[Holder, set[bytes]] = {}
        self._expected: dict[Holder, dict[bytes, None]] = {}

    def reset(self, holder: Holder) -> None:
        """Forget what the holder held: it started anew."""
        self._held[holder] = set()
        self._expected.pop(holder, None)

    def expect(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        """The holder was asked to compute these blocks; if it does not, it will never say so."""
        held = self._held.get(holder) or ()
        expected = self._expected.setdefault(holder, {})
        expected.update(dict.fromkeys(block for block in hashes if block not in held))
        if len(expected) > MAX_EXPECTED:
            kept = list(expected)[-MAX_EXPECTED // 2 :]
            self._expected[holder] = dict.fromkeys(kept)

    def add(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        """The holder holds these blocks too."""
        added = set(hashes)
        self._held.setdefault(holder, set()).update(added)
        self._settle_expected(holder, added)

    def remove(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        """The holder no longer holds these blocks."""
        removed = set(hashes)
        self._held.get(holder, set()).difference_update(removed)
        self._settle_expected(holder, removed)

    def keep_only(self, worker_ids: Iterable[str]) -> None:
        """Forget workers that are gone."""
        living = set(worker_ids)
        self._held = {holder: held for holder, held in self._held.items() if holder[0] in living}
        self._expected = {holder: held for holder, held in self._expected.items() if holder[0] in living}

    def leading_blocks(self, holder: Holder, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` the holder holds, or is expected to, without a gap."""
        held = self._held.get(holder) or ()
        expected = self._expected.get(holder) or ()
        for position, block in enumerate(hashes):
            if block not in held and block not in expected:
                return position
        return len(hashes)

    def _settle_expected(self, holder: Holder, hashes: Iterable[bytes]) -> None:
        expected = self._expected.get(holder)
        if expected:
            for block in hashes:
                expected.pop(block, None)


def split_hashes(joined: bytes, *, size: int = 16) -> list[bytes]:
    """Hashes of `size` bytes from their concatenation."""
    return [joined[start : start + size] for start in range(0, len(joined), size)]
