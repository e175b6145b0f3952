"""From a plan to an engine that is warm; runs in the engine process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trireme.constraints.guide import guides_of
from trireme.engine import (
    EncoderEngine,
    Engine,
    EngineSettings,
    KvTier,
    Mode,
    SamplingParams,
    SequenceRequest,
)
from trireme.engine.kv_memory import block_bytes
from trireme.engine.speculation.draft_checkpoint import load_draft
from trireme.errors import InvalidConfiguration
from trireme.kernels.read_speed import read_bytes_per_s
from trireme.loading.encoders import load_encoder
from trireme.loading.whole import load_whole
from trireme.models.checkpoint import Checkpoint
from trireme.models.null import NullModel
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.speculation import SpeculationSettings
from trireme.worker.engine_messages import Loaded
from trireme.worker.preload_rule import PreloadRule
from trireme.worker.variant_plan import VariantPlan

NULL_BLOCKS = 65536
NULL_CONTEXT_TOKENS = 131072
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(plan: VariantPlan, tier: KvTier) -> tuple[Engine | EncoderEngine, PreloadRule | None]:
    """Read the checkpoint and put an engine around it; the rule is to be told what its steps take.

    Raises:
        InvalidCheckpoint: its files cannot be read.
        InvalidConfiguration: a size is out of range, or the checkpoint is quantized to another precision.
    """
    if plan.device == "null":
        settings = _settings(
            plan,
            num_blocks=NULL_BLOCKS,
            host_blocks=NULL_BLOCKS if plan.swap_bytes else 0,
            max_model_len=NULL_CONTEXT_TOKENS,
        )
        engine = Engine(NullModel(), settings, tier, eos_token_ids=frozenset(), model_key="null")
        return engine, None
    device = plan.device.partition("/")[0]
    dtype = _DTYPES.get(plan.dtype) or (torch.float32 if device == "cpu" else torch.bfloat16)
    with Checkpoint(plan.checkpoint) as checkpoint:
        if checkpoint.config.encoder is not None:
            return _encoder_engine(plan, checkpoint, device=device, dtype=dtype), None
        per_block = block_bytes(
            checkpoint.config, block_size=plan.block_tokens, dtype=dtype, kv_dtype=plan.kv_dtype
        )
        draft, drafting_bytes = None, 0
        if plan.draft is not None:
            draft = load_draft(plan.draft, plan.checkpoint, device=device, dtype=dtype)
            drafting_bytes = block_bytes(draft.config, block_size=plan.block_tokens, dtype=dtype)
        loaded = load_whole(checkpoint, device=device, dtype=dtype, precision=plan.precision)
        rule = PreloadRule(
            num_layers=checkpoint.config.num_layers,
            bytes_per_token=per_block / plan.block_tokens,
            bytes_per_s=lambda: engine.stats().host_in_bytes_per_s,
        )
        engine = Engine(
            loaded.model,
            _settings(
                plan,
                num_blocks=max(2, plan.kv_bytes // (per_block + drafting_bytes)),
                host_blocks=plan.swap_bytes // per_block,
            ),
            tier,
            eos_token_ids=checkpoint.eos_token_ids,
            model_key=loaded.key,
            preload_layers=rule,
            draft=draft,
            guides=guides_of(
                plan.checkpoint,
                vocab_size=checkpoint.config.vocab_size,
                eos_token_ids=checkpoint.eos_token_ids,
            ),
        )
        return engine, rule


def _encoder_engine(
    plan: VariantPlan, checkpoint: Checkpoint, *, device: str, dtype: torch.dtype
) -> EncoderEngine:
    if plan.draft is not None or plan.speculate != "off":
        raise InvalidConfiguration(
            f"variant {plan.variant!r} is an encoder, which cannot speculate", param="speculate"
        )
    loaded = load_encoder(checkpoint, device=device, dtype=dtype, precision=plan.precision)
    return EncoderEngine(
        loaded.model,
        loaded.pooling,
        max_batch_tokens=plan.max_batch_tokens,
        max_num_seqs=plan.max_sequences,
        model_key=loaded.key,
    )


def warm_up(engine: Engine | EncoderEngine, *, beat: Callable[[], None]) -> None:
    """Run the engine, so that its first request finds it warm; `beat` is called after each step.

    Under mlfq prompts of several lengths run, each twice, so that it knows what lengths cost.
    """
    learns = isinstance(engine, Engine) and engine.settings.policy == "mlfq"
    lengths = (8, 32, 128, 256, 8, 32, 128, 256) if learns else (64,)
    for number, length in enumerate(lengths):
        count = min(length, engine.max_model_len // 2)
        probe = SequenceRequest(
            sequence_id="warm-up",
            prompt_token_ids=[token % engine.model.config.vocab_size for token in range(count)],
            sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
            salt=b"warm-up %d" % number,
            mode=Mode.GENERATE if isinstance(engine, Engine) else Mode.EMBED,
        )
        engine.add(probe)
        while engine.has_work:
            engine.step()
            beat()


def describe(engine: Engine | EncoderEngine) -> Loaded:
    """What the worker must know of it."""
    if isinstance(engine, EncoderEngine):
        return Loaded(
            kv_namespace=f"{engine.model_key}/none",
            context_tokens=engine.max_model_len,
            vocabulary_size=engine.model.config.vocab_size,
            block_bytes=0,
            num_blocks=engine.stats().kv_blocks_total,
            step_bytes=engine.model.step_bytes,
        )
    config, settings = engine.model.config, engine.settings
    return Loaded(
        kv_namespace=f"{engine.model_key}/{engine.kv_layout}",
        context_tokens=engine.max_model_len,
        vocabulary_size=config.vocab_size,
        block_bytes=block_bytes(
            config, block_size=settings.block_size, dtype=engine.model.dtype, kv_dtype=settings.kv_dtype
        ),
        num_blocks=settings.num_blocks,
        step_bytes=engine.model.step_bytes,
        read_bytes_per_s=(
            read_bytes_per_s(torch.get_num_threads()) if engine.model.device.type == "cpu" else 0.0
        ),
        turns_keys=engine.model.key_rotation is not None,
    )


def _settings(
    plan: VariantPlan, *, num_blocks: int, host_blocks: int, max_model_len: int | None = None
) -> EngineSettings:
    return EngineSettings(
        num_blocks=num_blocks,
        host_blocks=host_blocks,
        block_size=plan.block_tokens,
        kv_dtype=plan.kv_dtype,  # type: ignore[arg-type]  # the cache refuses what it does not know
        max_num_seqs=plan.max_sequences,
        max_batch_tokens=plan.max_batch_tokens,
        max_model_len=max_model_len,
        policy=plan.policy,  # type: ignore[arg-type]  # the settings refuse what they do not know
        mlfq=MlfqSettings(learns_quanta=plan.learns_quanta),
        decode_graphs=plan.decode_graphs,
        speculation=_speculation(plan),
    )


def _speculation(plan: VariantPlan) -> SpeculationSettings | None:
    if plan.speculate == "off":
        return None
    fixed = None if plan.speculate == "auto" else plan.speculate
    return SpeculationSettings(fixed_tokens=fixed, beside=plan.draft_beside, branches=plan.draft_branches)
