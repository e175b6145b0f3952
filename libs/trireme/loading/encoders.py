"""From a checkpoint to an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.models.checkpoint import Checkpoint
from trireme.models.encoder import Encoder
from trireme.models.pooling import Pooling, read_pooling
from trireme.models.weights import ModelWeights
from trireme.quant import foreign_schemes, manifest
from trireme.quant.precisions import AUTO, candidate_formats


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEncoder:
    """An encoder, how its vectors are made, and which weights it has."""

    model: Encoder
    pooling: Pooling
    key: str
    """Changes with the architecture and the weights."""


def load_encoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str = AUTO,
) -> LoadedEncoder:
    """Read a checkpoint whose configuration is an encoder's.

    Args:
        device: where the weights go.
        dtype: float32, bfloat16 or float16: what is computed in.
        precision: `auto` or a float type: encoders are not served in few bits.

    Raises:
        InvalidCheckpoint: the files are missing or malformed, or the weights are in few bits.
        InvalidConfiguration: `precision` names a format in few bits.
    """
    if candidate_formats(precision):
        raise InvalidConfiguration(
            f"precision {precision} is not served for a {checkpoint.config.model_type}; use {AUTO}",
            param="precision",
        )
    for key in (manifest.KEY, foreign_schemes.KEY):
        if checkpoint.raw_config.get(key) is not None:
            raise InvalidCheckpoint(f"{checkpoint.directory}: {key}: encoders in few bits are not served")
    weights = ModelWeights(checkpoint, device=torch.device(device), dtype=dtype)
    with torch.inference_mode():
        model = Encoder.load(weights)
    return LoadedEncoder(
        model=model, pooling=read_pooling(checkpoint.directory), key=checkpoint.fingerprint()
    )
