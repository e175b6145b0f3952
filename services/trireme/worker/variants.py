"""The variants a worker serves: loading, speeds, resident blocks, standing in the registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from trireme.engine import Engine, EngineSettings, EngineStats, SamplingParams, SequenceRequest, StepResult
from trireme.engine.kv_cache import block_bytes
from trireme.errors import InvalidRequest, ModelNotFound, RequestConflict
from trireme.loading.whole import load_model
from trireme.models.checkpoint import Checkpoint
from trireme.models.null import NullModel
from trireme.runtime.fleet import Fleet, WorkerGroup
from trireme.wire.bus.v1.facts_pb2 import VariantStatus
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.worker.engine_thread import EngineThread

log = logging.getLogger(__name__)

SMOOTHING = 0.1
"""Weight of the newest step in the measured speeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantPlan:
    """What to load."""

    variant: str
    model: str
    checkpoint: Path
    device: str
    """cpu, cuda:N, or null for the model that answers without computing."""
    dtype: str
    kv_bytes: int
    settings: EngineSettings
    """All but the number of blocks, which follows from `kv_bytes` and the checkpoint."""


class ResidencyLog:
    """Meets the engine's `KvTier`: notes, on the engine's thread, which blocks come and go."""

    def __init__(self) -> None:
        self._notes: deque[tuple[bytes, bool]] = deque()

    def match(self, hashes: Sequence[bytes]) -> int:
        return 0  # the worker asks the store itself, before it adds a sequence

    def on_cached(self, block_hash: bytes) -> None:
        self._notes.append((block_hash, True))

    def on_evicted(self, block_hash: bytes, export: Callable[[], bytes]) -> None:
        self._notes.append((block_hash, False))

    def drain(self) -> Iterator[tuple[bytes, bool]]:
        """The notes so far, oldest first: (hash, came)."""
        while self._notes:
            yield self._notes.popleft()


@dataclass(slots=True)
class LoadedVariant:
    """One variant, as known on the event loop; the engine itself stays with its thread."""

    plan: VariantPlan
    kv_namespace: str
    context_tokens: int
    vocabulary_size: int
    block_tokens: int
    residency: ResidencyLog
    stats: EngineStats
    ready: bool = True
    resident: set[bytes] = field(default_factory=set)
    added: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    unsaved: list[bytes] = field(default_factory=list)
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    billed_joules: float = 0.0
    billed_engine_s: float = 0.0

    def note_step(self, result: StepResult, stats: EngineStats) -> None:
        """Learn speeds and residency from one step."""
        self.stats = stats
        for block, came in self.residency.drain():
            if came:
                self.resident.add(block)
                self.added.append(block)
                self.unsaved.append(block)
            else:
                self.resident.discard(block)
                self.removed.append(block)
        prefill = sum(work.prefill_tokens for work in result.work)
        if prefill >= 16 and result.seconds > 0:
            seconds = sum(work.seconds for work in result.work if work.prefill_tokens)
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, prefill / max(seconds, 1e-9))
        elif result.work and not prefill and result.seconds > 0:
            self.decode_tokens_per_s = _smooth(self.decode_tokens_per_s, 1.0 / result.seconds)

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
            max_sequences=self.plan.settings.max_num_seqs,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks=stats.kv_blocks_total,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_tokens_per_s=self.decode_tokens_per_s,
            context_tokens=self.context_tokens,
            vocabulary_size=self.vocabulary_size,
            kv_namespace=self.kv_namespace,
            block_tokens=self.block_tokens,
            prefill_tokens_total=stats.prefill_tokens,
            decode_tokens_total=stats.decode_tokens,
            cached_tokens_total=stats.prefix_hit_tokens,
        )


class VariantTable:
    """All variants of this worker."""

    def __init__(self, engines: EngineThread) -> None:
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
        """
        if plan.variant in self._loaded or plan.variant in self._loading:
            raise RequestConflict(f"variant {plan.variant!r} is loaded already", param="variant")
        self._loading.add(plan.variant)
        started_s = time.monotonic()
        try:
            residency = ResidencyLog()
            engine = await asyncio.to_thread(_build, plan, residency)
            stats = await self._engines.call(lambda engines: _install(engines, plan.variant, engine))
        finally:
            self._loading.discard(plan.variant)
        self._loaded[plan.variant] = LoadedVariant(
            plan=plan,
            kv_namespace=f"{engine.model_key}/{engine.kv_layout}",
            context_tokens=engine.max_model_len,
            vocabulary_size=engine.model.config.vocab_size,
            block_tokens=plan.settings.block_size,
            residency=residency,
            stats=stats,
        )
        load_s = time.monotonic() - started_s
        log.info("variant_loaded", extra={"variant": plan.variant, "load_s": round(load_s, 3)})
        return load_s

    async def unload(self, variant: str) -> None:
        """Take no new requests for a variant, wait until it has none, free it.

        Raises:
            ModelNotFound: it is not loaded here.
        """
        loaded = self.get(variant)
        loaded.ready = False
        while not await self._engines.call(lambda engines: _free_if_idle(engines, variant)):
            await asyncio.sleep(0.05)
        self._loaded.pop(variant, None)
        log.info("variant_unloaded", extra={"variant": variant})


def plans_of(fleet: Fleet, group: WorkerGroup) -> list[VariantPlan]:
    """What a worker of the group loads at start."""
    plans = []
    for name in fleet.served_by(group):
        variant = fleet.variant(name)
        plans.append(
            VariantPlan(
                variant=name,
                model=fleet.model_of(name),
                checkpoint=variant.checkpoint,
                device=group.device,
                dtype=variant.dtype,
                kv_bytes=(variant.kv_mib or group.kv_mib) * 2**20,
                settings=EngineSettings(
                    num_blocks=1,
                    block_size=fleet.block_tokens,
                    max_num_seqs=variant.max_sequences or group.max_sequences,
                    max_batch_tokens=max(
                        group.max_batch_tokens, variant.max_sequences or group.max_sequences
                    ),
                    policy=group.policy,
                ),
            )
        )
    return plans


def plan_from_request(
    request: pb.LoadVariantRequest, group: WorkerGroup, *, block_tokens: int
) -> VariantPlan:
    """What placement asks this worker to load.

    Raises:
        InvalidRequest: a field is missing or malformed.
    """
    if not request.variant or not request.checkpoint:
        raise InvalidRequest("variant and checkpoint are required", param="variant")
    dtype = request.dtype or "auto"
    if dtype not in ("auto", *_DTYPES):
        raise InvalidRequest(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}", param="dtype")
    sequences = request.max_sequences or group.max_sequences
    return VariantPlan(
        variant=request.variant,
        model=request.model or request.variant,
        checkpoint=Path(request.checkpoint),
        device=group.device,
        dtype=dtype,
        kv_bytes=request.kv_bytes or group.kv_mib * 2**20,
        settings=EngineSettings(
            num_blocks=1,
            block_size=block_tokens,
            max_num_seqs=sequences,
            max_batch_tokens=max(group.max_batch_tokens, sequences),
            policy=group.policy,
        ),
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _build(plan: VariantPlan, residency: ResidencyLog) -> Engine:
    if plan.device == "null":
        settings = replace(plan.settings, num_blocks=65536, max_model_len=131072)
        return Engine(NullModel(), settings, residency, eos_token_ids=frozenset(), model_key="null")
    dtype = _DTYPES.get(plan.dtype) or (torch.float32 if plan.device == "cpu" else torch.bfloat16)
    device = plan.device.partition("/")[0]
    with Checkpoint(plan.checkpoint) as checkpoint:
        config = checkpoint.config
        per_block = block_bytes(config, block_size=plan.settings.block_size, dtype=dtype)
        blocks = max(2, plan.kv_bytes // per_block)
        model = load_model(checkpoint, device=device, dtype=dtype)
        return Engine(
            model,
            replace(plan.settings, num_blocks=blocks),
            residency,
            eos_token_ids=checkpoint.eos_token_ids,
            model_key=checkpoint.fingerprint(),
        )


def _install(engines: dict[str, Engine], variant: str, engine: Engine) -> EngineStats:
    """Run the engine once, so that its first request finds it warm, then let it serve."""
    length = min(64, engine.max_model_len // 2)
    probe = SequenceRequest(
        sequence_id="warm-up",
        prompt_token_ids=[token % engine.model.config.vocab_size for token in range(length)],
        sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
        salt=b"warm-up",
    )
    engine.add(probe)
    while engine.has_work:
        engine.step()
    engines[variant] = engine
    return engine.stats()


def _free_if_idle(engines: dict[str, Engine], variant: str) -> bool:
    """One step, so that nothing is added to an engine between the look and its end."""
    engine = engines.get(variant)
    if engine is not None and engine.has_work:
        return False
    engines.pop(variant, None)
    return True


def _smooth(previous: float, value: float) -> float:
    return value if previous == 0.0 else (1 - SMOOTHING) * previous + SMOOTHING * value
