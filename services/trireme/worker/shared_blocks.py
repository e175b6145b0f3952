"""The KV store's arena as the engine process sees it: stored blocks to load, room to save to.

Bytes go between the arena and the engine's memory and nowhere else. What lies in the arena belongs to
another process, which may end or take a slot back: checksums and generations tell, and cost a miss.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from trireme.engine import SavedBlock, StoredBlock
from trireme.kvcache.arena import Arena, ArenaRef, attach_arena
from trireme.kvcache.arena_copies import room_for, view_of
from trireme.wire.kvstore.v1.kvstore_pb2 import AcquiredBlock, ReservedBlock
from trireme.worker.engine_messages import LetGo, SaveBlocks, StoredChain

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reads:
    """How much of a chain is still to be read; its blocks are let go of one by one, by any thread."""

    open: int
    corrupt: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def end_one(self) -> bool:
        """Whether this was the last one."""
        with self.lock:
            self.open -= 1
            return self.open == 0


class SharedBlocks:
    """Maps the arena of the store that is there now; its methods belong to the engine's thread.

    Args:
        let_go: told, from any thread, when a chain is not read any more.
    """

    def __init__(self, let_go: Callable[[LetGo], None]) -> None:
        self._let_go = let_go
        self._arena: Arena | None = None
        self._stop_prefault = threading.Event()

    def stored(self, chain: StoredChain) -> tuple[StoredBlock, ...]:
        """The chain's leading blocks that are there; let go of at once where none is."""
        arena = self._mapped(chain.arena)
        views: list[memoryview] = []
        for offset, size, checksum, generation in chain.blocks if arena is not None else ():
            assert arena is not None
            block = AcquiredBlock(offset=offset, payload_bytes=size, checksum=checksum, generation=generation)
            view = view_of(arena, block)
            if view is None:
                break
            views.append(view)
        if not views:
            self._let_go(LetGo(chain.lease, ()))
            return ()
        reads = _Reads(open=len(views))

        def release() -> None:
            if reads.end_one():
                self._let_go(LetGo(chain.lease, tuple(reads.corrupt)))

        return tuple(
            StoredBlock(block_hash, view, checksum, release, functools.partial(reads.corrupt.append, place))
            for place, (block_hash, view, (_, _, checksum, _)) in enumerate(
                zip(chain.hashes, views, chain.blocks, strict=False)
            )
        )

    def rooms(self, question: SaveBlocks) -> Callable[[bytes], memoryview | None] | None:
        """Where each block's bytes go; None where the arena is gone."""
        arena = self._mapped(question.arena)
        if arena is None:
            return None
        places = {block_hash: place for block_hash, *place in question.rooms}

        def room(block_hash: bytes) -> memoryview | None:
            offset, size, generation = places[block_hash]
            return room_for(arena, ReservedBlock(offset=offset, generation=generation), size)

        return room

    def _mapped(self, ref: ArenaRef) -> Arena | None:
        if self._arena is not None and self._arena.ref.arena_id == ref.arena_id:
            return self._arena
        try:
            self._arena = attach_arena(ref)
        except OSError as error:
            log.warning("kv_arena_unreachable", extra={"path": ref.path, "error": str(error)})
            return None
        self._stop_prefault.set()
        self._stop_prefault = threading.Event()
        threading.Thread(target=self._arena.prefault, args=(self._stop_prefault,), daemon=True).start()
        return self._arena


def checksums(question: SaveBlocks, saved: tuple[SavedBlock, ...]) -> tuple[int | None, ...]:
    """The answer to a question, given what was written."""
    sums = {block.block_hash: block.checksum for block in saved}
    return tuple([sums.get(block_hash) for block_hash, *_ in question.rooms])
