"""Which of several formats is nearest to a checkpoint's weights, told from some rows of each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import quantize
from trireme.quant.weight_error import pooled, weight_error
from trireme.quant.weight_files import CONFIG, open_weights, read_object, tensor_files
from trireme.quant.weight_kinds import is_stored_transposed, linear_kinds, weight_kind

SAMPLED_ROWS: Final = 16
"""Output channels read of each matrix, evenly spaced. Each has scales of its own, so they stand for all."""


def nearest_format(directory: Path, candidates: Sequence[WeightFormat]) -> WeightFormat:
    """The candidate with the least relative error over the linear layers of a checkpoint.

    The error is the norm of all differences over that of the weights. One candidate is chosen unread. Between
    formats of equal bits this is a choice of where the codes lie: weights that are as good as normally
    distributed want mantissa bits, rows with outliers want exponent bits.

    Args:
        directory: a checkpoint that is not quantized.
        candidates: at least one; the first of equally good ones is chosen.

    Raises:
        InvalidCheckpoint: the files are missing or damaged, have no linear layers known here, or a weight
            that cannot be quantized.
    """
    if len(candidates) == 1:
        return candidates[0]
    samples = list(_samples(directory))
    if not samples:
        raise InvalidCheckpoint(f"{directory} has no weights of linear layers to quantize")

    def error(form: WeightFormat) -> float:
        return pooled(
            weight_error(sample, quantize(sample, form, name=name)) for name, sample in samples
        ).relative_frobenius

    return min(candidates, key=error)


def _samples(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Some output channels of each linear weight: name, (rows, input channels)."""
    model_type = read_object(directory / CONFIG).get("model_type")
    handles: dict[Path, Any] = {}
    for name, file in tensor_files(directory).items():
        kind = weight_kind(name)
        if kind not in linear_kinds(model_type):
            continue
        handle = handles.get(file)
        if handle is None:
            handle = handles[file] = open_weights(file)
        try:
            part = handle.get_slice(name)
            shape = part.get_shape()
            if len(shape) != 2 or 0 in shape:
                raise InvalidCheckpoint(
                    f"{name} has shape {tuple(shape)}; only non-empty matrices can be quantized"
                )
            if is_stored_transposed(kind, model_type):
                yield name, torch.cat([part[:, i : i + 1] for i in _spaced(shape[1])], dim=1).T.contiguous()
            else:
                yield name, torch.cat([part[i : i + 1] for i in _spaced(shape[0])])
        except SafetensorError as error:
            raise InvalidCheckpoint(f"{file}: tensor {name} cannot be read: {error}") from error


def _spaced(count: int) -> list[int]:
    taken = min(SAMPLED_ROWS, count)
    return [index * count // taken for index in range(taken)]
