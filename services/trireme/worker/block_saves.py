"""From the engine to the KV store: completed blocks, beside the steps.

The store gives room in its arena, the engine process writes there and says the checksums, the store is
told that the blocks are whole. Whoever dies in between leaves nothing that can be read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from itertools import islice
from typing import cast

from trireme.kvcache.store_client import StoreClient
from trireme.worker.engine_messages import SaveBlocks
from trireme.worker.live_requests import LiveRequest
from trireme.worker.request_chains import RequestChains
from trireme.worker.variants import Engines, LoadedVariant, VariantTable

log = logging.getLogger(__name__)

SAVE_BATCH = 64
"""Blocks copied at once."""
MAX_WAITING = 20_000
"""Blocks that wait to be saved; those that came first are given up where the store is too slow."""


class BlockSaves:
    """One store, all variants of a worker; without a store nothing is saved."""

    def __init__(
        self, store: StoreClient | None, engines: Engines, variants: VariantTable, chains: RequestChains
    ) -> None:
        self._store = store
        self._engines = engines
        self._variants = variants
        self._chains = chains
        self._waiting: dict[str, dict[bytes, str]] = {}
        """By variant: hashes and their tenants."""
        self._wake = asyncio.Event()
        self._noting: set[asyncio.Task[object]] = set()
        self.saved_blocks = 0

    def note_complete(self, loaded: LoadedVariant, hashes: Sequence[bytes]) -> None:
        """The engine has these blocks now, computed or loaded."""
        if hashes and self._store is not None and loaded.loaded.block_bytes:
            owned = [(block, self._chains.owner(block)) for block in hashes]
            self._want(loaded, {block: tenant for block, tenant in owned if tenant is not None})

    def note_end(self, loaded: LoadedVariant, live: LiveRequest) -> None:
        """A request is over: its conversation goes on from its chain, which is to be in the store whole.

        Most of it is there. What the store lost, in a restart say, is saved again while the engine has it.
        """
        chains = self._chains.end(live)
        request = live.assignment.request
        if self._store is None or not loaded.loaded.block_bytes:
            return
        for chain in chains:
            resident = {block: request.tenant for block in chain if block in loaded.resident}
            self._want(loaded, resident)
        if request.session_id and chains and chains[0]:
            noting = self._store.note_session(
                request.tenant,
                request.session_id,
                loaded.kv_namespace,
                chains[0],
                version=int(time.time() * 1e6),
            )
            task: asyncio.Task[object] = asyncio.create_task(noting)
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)

    async def run(self) -> None:
        """Copy completed blocks to the store, a few at a time, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for variant in list(self._waiting):
                while self._waiting.get(variant):
                    try:
                        await self._save_some(variant)
                    except Exception:  # What is not saved is computed again.
                        log.exception("kv_save_failed", extra={"variant": variant})

    def _want(self, loaded: LoadedVariant, blocks: dict[bytes, str]) -> None:
        assert self._store is not None
        missing = self._missing(loaded.kv_namespace, list(blocks))
        if not missing:
            return
        waiting = self._waiting.setdefault(loaded.plan.variant, {})
        for block in missing:
            waiting[block] = blocks[block]
        for block in list(islice(waiting, max(0, len(waiting) - MAX_WAITING))):
            del waiting[block]
        self._wake.set()

    def _missing(self, namespace: str, hashes: Sequence[bytes]) -> list[bytes]:
        """Those that the store does not seem to have."""
        store = self._store
        assert store is not None
        missing: list[bytes] = []
        start = 0
        while start < len(hashes):
            start += store.match_local(namespace, hashes[start:])
            missing += hashes[start : start + 1]
            start += 1
        return missing

    async def _save_some(self, variant: str) -> None:
        store, loaded, waiting = self._store, self._variants.find(variant), self._waiting[variant]
        if store is None or loaded is None:
            del self._waiting[variant]  # unloaded meanwhile
            return
        tenant = next(iter(waiting.values()))
        batch = [block for block in islice(waiting, SAVE_BATCH) if waiting[block] == tenant]
        for block in batch:
            del waiting[block]
        batch = self._missing(loaded.kv_namespace, batch)
        size = loaded.loaded.block_bytes
        room = await store.reserve(loaded.kv_namespace, [(block, size) for block in batch], tenant=tenant)
        if room is None:
            return
        places = {index: place for index in range(len(batch)) if (place := room.place(index)) is not None}
        try:
            if places:
                rooms = [(batch[i], place.offset, size, place.generation) for i, place in places.items()]
                question = SaveBlocks(variant, room.arena, tuple(rooms))
                sums = cast(tuple[int | None, ...], await self._engines.ask(question))
                for index, checksum in zip(places, sums, strict=True):
                    if checksum is not None:
                        room.seal(index, checksum)
        finally:
            self.saved_blocks += await store.commit(room)
