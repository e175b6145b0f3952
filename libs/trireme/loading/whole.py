"""The plain loader: every weight is read and copied before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.loading.few_bits import open_few_bits, weights_key
from trireme.models.checkpoint import Checkpoint
from trireme.models.config import Family, ModelConfig, RopeKind
from trireme.models.decoder import Decoder
from trireme.models.gpt2 import Gpt2
from trireme.models.model import Model
from trireme.models.weights import ModelWeights
from trireme.quant.precisions import AUTO

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, and which weights it has."""

    model: Model
    key: str
    """Changes with the architecture, the weights or their precision: part of the root of block hashes."""
    weight_format: str
    """Of the linear layers: `int4_g64`, `float32`."""


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_positions: int | None = None,
    precision: str = AUTO,
) -> Model:
    """Read a checkpoint into a model: `load_whole`, where nobody needs to know which weights they are."""
    return load_whole(
        checkpoint, device=device, dtype=dtype, max_positions=max_positions, precision=precision
    ).model


def load_whole(
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_positions: int | None = None,
    precision: str = AUTO,
) -> LoadedModel:
    """Read a checkpoint into a model.

    Args:
        checkpoint: a directory in Hugging Face layout, or one opened already; quantized or not.
        device: where the weights go.
        dtype: float32, bfloat16 or float16: what is computed in.
        max_positions: longest sequence to be served; None: the model's context.
        precision: one of `quant.precisions`: what the linear layers are to be in. `auto`: what they are
            stored in.

    Raises:
        InvalidCheckpoint: the files are missing, malformed or of an unsupported architecture, or a weight
            cannot be quantized.
        InvalidConfiguration: `max_positions` exceeds the model's context, or the checkpoint is quantized to
            another precision.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    try:
        check_decodes(opened.config, opened.directory)
        limit = opened.config.context_limit
        if max_positions is not None and not 1 <= max_positions <= limit:
            raise InvalidConfiguration(
                f"max_positions is {max_positions}, but the model's context is {limit}"
            )
        few_bits = open_few_bits(opened, precision)
        try:
            weights = ModelWeights(opened, few_bits, device=torch.device(device), dtype=dtype)
            with torch.inference_mode():
                model = _read(weights, max_positions or limit)
            dtype_name = str(dtype).removeprefix("torch.")
            loaded = LoadedModel(
                model=model,
                key=weights_key(opened, few_bits) + _rotation_key(model),
                weight_format=dtype_name if few_bits is None else few_bits.form.name,
            )
        finally:
            if few_bits is not None:
                few_bits.close()
    finally:
        opened.close()
    if weights.expanded_bytes:
        log.info(
            "weights_expanded",
            extra={
                "checkpoint": str(opened.directory),
                "format": loaded.weight_format,
                "dtype": dtype_name,
                "stored_bytes": weights.stored_bytes,
                "expanded_bytes": weights.expanded_bytes,
            },
        )
    return loaded


def _rotation_key(model: Model) -> str:
    """Keys that longrope turned by one set of frequencies are none for a model that turns by the other."""
    rope = model.config.rope
    if rope is None or rope.kind is not RopeKind.LONGROPE:
        return ""
    return ":long" if model.max_positions > rope.original_max_positions else ":short"


def check_decodes(config: ModelConfig, directory: Path) -> None:
    """Raise InvalidCheckpoint for an encoder, where a model that generates is wanted."""
    if config.encoder is not None:
        raise InvalidCheckpoint(
            f"{directory}: a {config.model_type} embeds and classifies; it does not generate text"
        )


def _read(weights: ModelWeights, max_positions: int) -> Model:
    if weights.config.family is Family.GPT2:
        return Gpt2.load(weights)
    return Decoder.load(weights, max_positions=max_positions)
