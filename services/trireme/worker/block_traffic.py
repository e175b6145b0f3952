"""KV blocks between the engine and the lower tiers: fetched before a prefill, saved after it.

Neither is ever on the critical path of a step: a block that is late is computed instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from trireme.engine import Engine
from trireme.kvcache.store_client import StoreClient
from trireme.worker.engine_thread import EngineThread
from trireme.worker.variants import LoadedVariant, VariantTable

log = logging.getLogger(__name__)

SAVE_BATCH = 32
"""Blocks copied out of the engine between two steps."""
ASK_SMOOTHING = 0.1
MAX_REMEMBERED = 200_000
"""Hashes known to be in the store, so that they are not saved again."""


class BlockTraffic:
    """One store, all variants of a worker. Without a store nothing is asked and nothing saved."""

    def __init__(
        self, store: StoreClient | None, engines: EngineThread, variants: VariantTable, *, deadline_s: float
    ) -> None:
        self._store = store
        self._engines = engines
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

        def bring_in(engines: dict[str, Engine]) -> int:
            engine = engines.get(variant)
            if engine is None:
                return 0
            return sum(engine.import_block(block, payload) for block, payload in blocks)

        came = await self._engines.call(bring_in)
        self.fetched_blocks += came
        for block, _ in blocks:
            self._remember(loaded.kv_namespace, block)
        return came

    def note_cached(self, loaded: LoadedVariant, hashes: Sequence[bytes]) -> None:
        """The engine completed these blocks: save them when there is time."""
        if self._store is None or loaded.plan.device == "null":
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
        chosen = list(waiting)[:SAVE_BATCH]
        for block in chosen:
            del waiting[block]
        if not waiting:
            del self._unsaved[variant]

        def copy_out(engines: dict[str, Engine]) -> list[tuple[bytes, bytes]]:
            engine = engines.get(variant)
            copies = [(block, engine.export_block(block)) for block in chosen] if engine else []
            return [(block, payload) for block, payload in copies if payload is not None]

        payloads = await self._engines.call(copy_out)
        loaded = self._variants.find(variant)
        if loaded is None:
            return  # unloaded meanwhile
        self.saved_blocks += await self._store.save(loaded.kv_namespace, payloads, tenant="")
        for block, _ in payloads:
            self._remember(loaded.kv_namespace, block)

    def _remember(self, namespace: str, block: bytes) -> None:
        self._saved[(namespace, block)] = None
        while len(self._saved) > MAX_REMEMBERED:
            del self._saved[next(iter(self._saved))]
