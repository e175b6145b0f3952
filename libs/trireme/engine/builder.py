"""From a checkpoint directory to an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from trireme.constraints.guide import guides_of
from trireme.engine.engine import Engine
from trireme.engine.kv_copies import Link
from trireme.engine.kv_preloads import LayersNeeded
from trireme.engine.settings import EngineSettings
from trireme.engine.speculation.draft_checkpoint import load_draft
from trireme.engine.tier import KvTier
from trireme.loading.whole import load_whole
from trireme.models.checkpoint import Checkpoint
from trireme.quant.precisions import AUTO


def build(
    checkpoint_dir: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    settings: EngineSettings | None = None,
    *,
    precision: str = AUTO,
    draft_dir: Path | str | None = None,
    kv_tier: KvTier | None = None,
    preload_layers: int | LayersNeeded = 1,
    link: Link | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """Load a checkpoint and put an engine around it. The number of threads is the caller's.

    Args:
        settings: None: 512 blocks and the defaults.
        precision: of the linear layers: see `load_whole`.
        draft_dir: checkpoint of a model that drafts, where the settings speculate.
        kv_tier, preload_layers, link, clock: as for `Engine`.

    Raises:
        InvalidCheckpoint: the files are missing, malformed or of an unsupported architecture.
        InvalidConfiguration: a size is out of range, the checkpoint is quantized to another precision, or the
            draft model has other tokens.
    """
    settings = settings or EngineSettings(num_blocks=512)
    with Checkpoint(checkpoint_dir) as checkpoint:
        limit = checkpoint.config.context_limit
        wanted = settings.max_model_len or settings.num_blocks * settings.block_size
        loaded = load_whole(
            checkpoint, device=device, dtype=dtype, max_positions=min(limit, wanted), precision=precision
        )
        draft = None
        if draft_dir is not None:
            draft = load_draft(Path(draft_dir), Path(checkpoint_dir), device=device, dtype=dtype)
        return Engine(
            loaded.model,
            settings,
            kv_tier=kv_tier,
            eos_token_ids=checkpoint.eos_token_ids,
            model_key=loaded.key,
            preload_layers=preload_layers,
            link=link,
            clock=clock,
            draft=draft,
            guides=guides_of(
                Path(checkpoint_dir),
                vocab_size=checkpoint.config.vocab_size,
                eos_token_ids=checkpoint.eos_token_ids,
            ),
        )
