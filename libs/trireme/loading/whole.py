"""The plain loader: every weight is read and copied before the first step."""

from __future__ import annotations

from pathlib import Path

import torch

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.models.checkpoint import Checkpoint
from trireme.models.config import Family
from trireme.models.decoder import Decoder
from trireme.models.gpt2 import Gpt2
from trireme.models.model import Model


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_positions: int | None = None,
) -> Model:
    """Read a checkpoint into a model.

    Args:
        checkpoint: a directory in Hugging Face layout, or one opened already.
        device: where the weights go.
        dtype: float32, bfloat16 or float16.
        max_positions: longest sequence to be served; None: the model's context.

    Raises:
        InvalidCheckpoint: the files are missing, malformed, quantized or of an unsupported architecture.
        InvalidConfiguration: `max_positions` exceeds the model's context.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    if "quantization" in opened.raw_config:
        opened.close()
        raise InvalidCheckpoint(
            f"{opened.directory} is quantized and cannot be served yet: "
            "name the checkpoint that it was made from"
        )
    limit = opened.config.context_limit
    if max_positions is not None and not 1 <= max_positions <= limit:
        raise InvalidConfiguration(f"max_positions is {max_positions}, but the model's context is {limit}")
    target = torch.device(device)
    try:
        with torch.inference_mode():
            if opened.config.family is Family.GPT2:
                return Gpt2.load(opened, device=target, dtype=dtype)
            return Decoder.load(opened, device=target, dtype=dtype, max_positions=max_positions or limit)
    finally:
        opened.close()
