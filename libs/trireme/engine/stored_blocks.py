"""Blocks that come from a lower tier and blocks that go there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trireme.kvcache.block_codec import Buffer, payload_checksum


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that a lower tier holds, offered to the engine.

    The engine copies the payload before it checks it and uses the copy alone, so memory that
    changes under it costs a miss and never a wrong token.
    """

    block_hash: bytes
    payload: Buffer
    """In the engine's `kv_layout`; may be memory shared with another process."""
    checksum: int | None
    """`payload_checksum` of the payload; None: it was checked before."""
    release: Callable[[], None] | None = None
    """Called once, from any thread, when the engine will not read the payload any more."""
    on_corrupt: Callable[[], None] | None = None
    """Called before that, from any thread, if the payload did not have its checksum."""

    def let_go(self) -> None:
        """The payload is not needed any more."""
        if self.release is not None:
            self.release()


@dataclass(frozen=True, slots=True)
class SavedBlock:
    """A whole block that was copied out of the engine."""

    block_hash: bytes
    payload: memoryview
    """The bytes in `kv_layout`: the room that was given for them, or memory of its own."""
    checksum: int
    """`payload_checksum` of the payload."""


Room = Callable[[bytes], memoryview | None]
"""Where a block's bytes go, by its hash: writable, of the layout's length. None: it is not wanted
any more. Called on the copy's thread."""

OnSaved = Callable[[tuple[SavedBlock, ...]], None]
"""Called once, on the copy's thread, with the blocks that were saved, none of them partly."""


def let_go_of(blocks: Iterable[StoredBlock]) -> None:
    """None of these payloads is needed any more."""
    for block in blocks:
        block.let_go()


def is_intact(payload: Buffer, checksum: int | None) -> bool:
    """Whether a payload is the one that was stored."""
    return checksum is None or payload_checksum(payload) == checksum
