"""KV blocks between the engine and the lower tiers: fetched before a prefill, saved after it.

Neither is ever on the critical path of a step: a block that is late is computed instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import cast

from trireme.kvcache.store_client import StoreClient
from trireme.worker.engine_messages import ExportBlocks, ImportBlocks
from trireme.worker.transfer_area import TransferArea
from trireme.worker.variants import Engines, LoadedVariant, VariantTable

log = logging.getLogger(__name__)

SAVE_BATCH = 32
"""Blocks copied out of the engine between two steps."""
NO_ROOM_S = 0.01
"""Until the transfer area is looked at again."""
ASK_SMOOTHING = 0.1
MAX_REMEMBERED = 200_000
"""Hashes known to be in the store, so that they are not saved again."""


class BlockTraffic:
    """One store, all variants of a worker. Without a store nothing is asked and nothing saved.

    Blocks pass between this process and the engines' in `area`; what finds no room there is missed, or
    saved later.
    """

    def __init__(
        self,
        store: StoreClient | None,
        engines: Engines,
        area: TransferArea,
        variants: VariantTable,
        *,
        deadline_s: float,
    ) -> None:
        self._store = store
        self._engines = engines
        self._area = area
        self._variants = variants
        self._deadline_s = deadline_s
        self._unsaved: dict[str, dict[bytes, None]] = {}
        self._saved: dict[tuple[str, bytes], None] = {}
        self._wake = asyncio.Event()
        self._ask_s = 0.001
        self.fetched_blocks = 0
        self.saved_blocks = 0

    def worth_asking(self, loaded: LoadedVariant, hashes: Sequence[bytes]) -> bool:
        """Whether computing the blocks that the engine lacks would take longer than asking for them."""
        if self._store is None or loaded.prefill_tokens_per_s <= 0:
            return False
        missing = sum(block not in loaded.resident for block in hashes)
        return missing * loaded.block_tokens / loaded.prefill_tokens_per_s > self._ask_s

    async def fetch(self, variant: str, hashes: Sequence[bytes]) -> int:
        """Bring the prompt's missing leading blocks into the engine; returns how many came."""
        assert self._store is not None
        loaded = self._variants.find(variant)
        if loaded is None:
            return 0
        first = next((i for i, block in enumerate(hashes) if block not in loaded.resident), len(hashes))
        if first == len(hashes):
            return 0
        missing = list(hashes[first:])
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_s):
                found = await self._store.match(loaded.kv_namespace, missing)
                self._ask_s += ASK_SMOOTHING * (time.monotonic() - started_s - self._ask_s)
                if not found:
                    return 0
                payloads = await self._store.load(
                    loaded.kv_namespace, missing[:found], deadline_s=self._deadline_s
                )
        except TimeoutError:
            return 0
        blocks = [(b, p) for b, p in zip(missing, payloads, strict=False) if p is not None]
        came = await self._bring_in(variant, blocks)
        self.fetched_blocks += came
        for block, _ in blocks:
            self._remember(loaded.kv_namespace, block)
        return came

    async def _bring_in(self, variant: str, blocks: Sequence[tuple[bytes, bytes]]) -> int:
        area = self._area
        placed: list[tuple[bytes, int, int]] = []
        try:
            for block, payload in blocks:
                offset = area.take(len(payload))
                if offset is None:
                    break
                area.memory[offset : offset + len(payload)] = payload
                placed.append((block, offset, len(payload)))
            return cast(int, await self._engines.ask(ImportBlocks(variant, tuple(placed))))
        finally:
            for _, offset, _ in placed:
                area.give_back(offset)

    def note_cached(self, loaded: LoadedVariant, hashes: Sequence[bytes]) -> None:
        """The engine completed these blocks: save them when there is time."""
        if self._store is None or not 0 < loaded.loaded.block_bytes <= self._area.size_bytes:
            return  # the null model's blocks hold nothing
        namespace = loaded.kv_namespace
        fresh = [block for block in hashes if (namespace, block) not in self._saved]
        if fresh:
            self._unsaved.setdefault(loaded.plan.variant, {}).update(dict.fromkeys(fresh))
            self._wake.set()

    async def save(self) -> None:
        """Copy completed blocks to the store, a few at a time, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for variant in list(self._unsaved):
                while self._unsaved.get(variant):
                    await self._save_some(variant)

    async def _save_some(self, variant: str) -> None:
        assert self._store is not None
        waiting = self._unsaved[variant]
        loaded = self._variants.find(variant)
        if loaded is None:
            del self._unsaved[variant]  # unloaded meanwhile
            return
        length, area = loaded.loaded.block_bytes, self._area
        placed: list[tuple[bytes, int]] = []
        try:
            for block in list(waiting)[:SAVE_BATCH]:
                offset = area.take(length)
                if offset is None:
                    break
                placed.append((block, offset))
                del waiting[block]
            if not waiting:
                del self._unsaved[variant]
            if not placed:
                await asyncio.sleep(NO_ROOM_S)
                return
            lengths = cast(
                tuple[int, ...], await self._engines.ask(ExportBlocks(variant, tuple(placed), length))
            )
            found = [
                (block, area.memory[offset : offset + size])
                for (block, offset), size in zip(placed, lengths, strict=True)
                if size
            ]
            # The store's client may read on past its deadline, when the room is another's: then the
            # checksums differ, and the blocks are misses.
            self.saved_blocks += await self._store.save(loaded.kv_namespace, found, tenant="")
        finally:
            for _, offset in placed:
                area.give_back(offset)
        for block, _ in found:
            self._remember(loaded.kv_namespace, block)

    def _remember(self, namespace: str, block: bytes) -> None:
        self._saved[(namespace, block)] = None
        while len(self._saved) > MAX_REMEMBERED:
            del self._saved[next(iter(self._saved))]
