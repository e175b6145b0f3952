"""A tensor of a GGUF file as PyTorch's, or as codes where a format of ours has the very same values."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.gguf_import.architecture import Placement
from trireme.gguf_import.container import GgufFile, StoredTensor
from trireme.quant.formats import WeightFormat, weight_format
from trireme.quant.quantization import QuantizedWeight

CODED: Final = weight_format("int4_g32")
"""What Q4_0 is: 32 weights share a scale, a code of u stands for u - 8."""
_FLOATS: Final = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
"""Types that are kept as they are."""
READ: Final = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
_ROWS_BYTES: Final = 8 << 20
"""Dequantized at a time."""


def read_dense(
    file: GgufFile, stored: StoredTensor, placement: Placement, dtype: torch.dtype | None
) -> Tensor:
    """The tensor in `dtype`; None: float16 and bfloat16 as they are, all else float32, which is exact.

    Raises:
        InvalidCheckpoint: its type is not read here, or a weight is not finite.
    """
    if stored.form not in READ:
        known = ", ".join(sorted(form.name for form in READ))
        raise InvalidCheckpoint(
            f"{file.path}: tensor {stored.name} is of type {stored.form.name}; these are read: {known}"
        )
    raw = file.data(stored)
    target = dtype or _FLOATS.get(stored.form, torch.float32)
    out = torch.empty((raw.shape[0], stored.shape[-1]), dtype=target)
    step = max(1, _ROWS_BYTES // (4 * stored.shape[-1]))
    for first in range(0, raw.shape[0], step):
        # A scale that is no number is found below, by name.
        with np.errstate(invalid="ignore", over="ignore"):
            values = quants.dequantize(np.ascontiguousarray(raw[first : first + step]), stored.form)
        rows = torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, stored.shape[-1])
        narrowed = rows.to(target)
        if not bool(torch.isfinite(narrowed).all()):
            raise InvalidCheckpoint(
                f"{file.path}: tensor {stored.name} has weights that are not finite as {target}"
            )
        out[first : first + step] = narrowed
    order = _row_order(placement, out.shape[0])
    out = out if order is None else out.index_select(0, order)
    return out.view(stored.shape)


def is_coded(stored: StoredTensor) -> bool:
    """Whether `read_codes` reads it."""
    return stored.form is GGMLQuantizationType.Q4_0 and len(stored.shape) == 2


def read_codes(file: GgufFile, stored: StoredTensor, placement: Placement) -> QuantizedWeight:
    """The codes and scales of a matrix of Q4_0, without loss.

    Raises:
        InvalidCheckpoint: a scale is not finite.
    """
    rows, columns = stored.shape
    _, block_bytes = GGML_QUANT_SIZES[stored.form]
    blocks = np.ascontiguousarray(file.data(stored)).reshape(-1, block_bytes)
    scales: NDArray[np.float32] = blocks[:, :2].copy().view("<f2").astype(np.float32).reshape(-1)
    if not np.isfinite(scales).all():
        raise InvalidCheckpoint(f"{file.path}: tensor {stored.name} has scales that are not finite")
    # The first half of a block is in the low bits, the second in the high ones.
    codes = np.concatenate((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), axis=1)
    is_zero = scales == 0
    codes[is_zero] = 8
    scales[is_zero] = 1.0
    return _ordered(
        CODED,
        torch.from_numpy(codes).view(rows, columns),
        torch.from_numpy(scales).view(rows, -1),
        _row_order(placement, rows),
    )


def _ordered(form: WeightFormat, codes: Tensor, scales: Tensor, order: Tensor | None) -> QuantizedWeight:
    if order is not None:
        codes, scales = codes.index_select(0, order), scales.index_select(0, order)
    return QuantizedWeight(form=form, codes=codes, scales=scales)


def _row_order(placement: Placement, rows: int) -> Tensor | None:
    """Where each row comes from: llama.cpp rotates neighbours, Hugging Face's halves of a head are pairs."""
    if not placement.interleaved_heads:
        return None
    return torch.arange(rows).view(placement.interleaved_heads, -1, 2).transpose(1, 2).reshape(-1)
