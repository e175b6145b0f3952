"""The variants a worker serves: loading, speeds, resident blocks, standing in the registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from trireme.errors import ModelNotFound, RequestConflict
from trireme.policies.prefix_index import split_hashes
from trireme.policies.schedulers import PREEMPTIVE_POLICIES
from trireme.wire.bus.v1.facts_pb2 import VariantStatus
from trireme.worker.engine_messages import Load, Loaded, Question, Unload
from trireme.worker.step_news import EngineFigures, StepNews
from trireme.worker.variant_plan import VariantPlan

log = logging.getLogger(__name__)

SMOOTHING = 0.1
"""Weight of the newest step in the measured speeds."""


class Engines(Protocol):
    """The engine process, as far as variants and blocks are concerned: see `EngineClient`."""

    async def ask(self, question: Question) -> object: ...


@dataclass(slots=True)
class LoadedVariant:
    """One variant, as the worker knows it; the engine itself is in its own process."""

    plan: VariantPlan
    loaded: Loaded
    stats: EngineFigures
    ready: bool = True
    resident: set[bytes] = field(default_factory=set)
    added: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    unsaved: list[bytes] = field(default_factory=list)
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    billed_joules: float = 0.0
    billed_engine_s: float = 0.0

    @property
    def kv_namespace(self) -> str:
        return self.loaded.kv_namespace

    @property
    def block_tokens(self) -> int:
        return self.plan.block_tokens

    def note_step(self, news: StepNews) -> None:
        """Learn speeds and residency from one step."""
        self.stats = news.figures
        if news.came or news.left:
            came, left = split_hashes(news.came), split_hashes(news.left)
            self.resident.update(came)
            self.resident.difference_update(left)
            self.added += came
            self.unsaved += came
            self.removed += left
        if news.prefill_tokens >= 16:
            rate = news.prefill_tokens / max(news.prefill_s, 1e-9)
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, rate)
        elif news.seconds > 0 and not news.prefill_tokens and (news.tokens or news.work):
            # A sequence gets more than one token where it speculates.
            plain = len(news.tokens) // 3
            each = (plain + len(news.outputs)) / (plain + len(news.work))
            self.decode_tokens_per_s = _smooth(self.decode_tokens_per_s, max(1.0, each) / news.seconds)

    def take_residency(self) -> tuple[list[bytes], list[bytes]]:
        """Blocks that came and went since the last call."""
        added, self.added = self.added, []
        removed, self.removed = self.removed, []
        return added, removed

    def take_unsaved(self) -> list[bytes]:
        """Blocks completed since the last call."""
        unsaved, self.unsaved = self.unsaved, []
        return unsaved

    def status(self) -> VariantStatus:
        """Its part of the registry record."""
        stats = self.stats
        return VariantStatus(
            variant=self.plan.variant,
            model=self.plan.model,
            ready=self.ready,
            waiting=stats.waiting,
            running=stats.running,
            max_sequences=self.plan.max_sequences,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks=stats.kv_blocks_total,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_tokens_per_s=self.decode_tokens_per_s,
            context_tokens=self.loaded.context_tokens,
            vocabulary_size=self.loaded.vocabulary_size,
            kv_namespace=self.kv_namespace,
            block_tokens=self.block_tokens,
            prefill_tokens_total=stats.prefill_tokens,
            decode_tokens_total=stats.decode_tokens,
            cached_tokens_total=stats.prefix_hit_tokens,
            queue_limit=self.plan.queue_limit,
            preemptive=self.plan.policy in PREEMPTIVE_POLICIES,
            host_kv_blocks=stats.host_blocks_total,
        )


def _floor(loaded: Loaded) -> dict[str, float]:
    """What one stream can be read at, at most, of weights that no cache holds."""
    if not (loaded.step_bytes and loaded.read_bytes_per_s):
        return {}
    return {
        "weights_mib_per_token": round(loaded.step_bytes / 2**20, 1),
        "read_gb_per_s": round(loaded.read_bytes_per_s / 1e9, 1),
        "expected_tokens_per_s": round(loaded.read_bytes_per_s / loaded.step_bytes, 1),
    }


class VariantTable:
    """All variants of this worker."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._loaded: dict[str, LoadedVariant] = {}
        self._loading: set[str] = set()

    def __iter__(self) -> Iterator[LoadedVariant]:
        return iter(list(self._loaded.values()))

    def get(self, variant: str) -> LoadedVariant:
        """The loaded variant.

        Raises:
            ModelNotFound: it is not loaded here.
        """
        try:
            return self._loaded[variant]
        except KeyError:
            raise ModelNotFound(
                f"variant {variant!r} is not loaded on this worker", param="variant"
            ) from None

    def find(self, variant: str) -> LoadedVariant | None:
        """The loaded variant, if it is."""
        return self._loaded.get(variant)

    async def load(self, plan: VariantPlan) -> float:
        """Make a variant available; returns the seconds it took.

        Raises:
            RequestConflict: it is loaded, or being loaded.
            InvalidCheckpoint: its files cannot be read.
            InvalidConfiguration: one of its sizes is out of range.
        """
        if plan.variant in self._loaded or plan.variant in self._loading:
            raise RequestConflict(f"variant {plan.variant!r} is loaded already", param="variant")
        self._loading.add(plan.variant)
        started_s = time.monotonic()
        try:
            answer = await self._engines.ask(Load(plan))
        finally:
            self._loading.discard(plan.variant)
        loaded, figures = cast(tuple[Loaded, EngineFigures], answer)
        self._loaded[plan.variant] = LoadedVariant(plan, loaded, figures)
        load_s = time.monotonic() - started_s
        log.info(
            "variant_loaded", extra={"variant": plan.variant, "load_s": round(load_s, 3), **_floor(loaded)}
        )
        return load_s

    async def unload(self, variant: str) -> None:
        """Take no new requests for a variant, wait until it has none, free it.

        Raises:
            ModelNotFound: it is not loaded here.
        """
        loaded = self.get(variant)
        loaded.ready = False
        while not await self._engines.ask(Unload(variant)):
            await asyncio.sleep(0.05)
        self._loaded.pop(variant, None)
        log.info("variant_unloaded", extra={"variant": variant})


def _smooth(previous: float, value: float) -> float:
    return value if previous == 0.0 else (1 - SMOOTHING) * previous + SMOOTHING * value
