"""Embeddings and linear layers whose weights stay in pinned host memory: the GPU reads them there, in place.

Worth it for what is read once or little of: a table of embeddings, an expert or a layer at a model's start. A
tensor that `Tensor.pin_memory` returned has the same address on the host and on the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trireme.kernels.cuda_launch import (
    Geometry,
    Kernel,
    Launcher,
    ShapeMismatch,
    ceil_div,
    check,
    check_multiple,
    type_name,
)
from trireme.kernels.cuda_linear import low_bit_linear
from trireme.quant.device_layouts import PackedWeight

TOKENS_IN_PLACE: Final = 8
"""Up to so many tokens a matrix crosses the link once, as when it is copied."""
GATHER_ROWS: Final = Kernel(source="gather_rows", name="gather_rows")
_PIECE_BYTES: Final = 16
_PIECES_OF_A_WARP: Final = 128
_WARPS: Final = 4


def embedding(launcher: Launcher, table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table, as `kernels.ops.embedding`; of it only they cross the link.

    Args:
        table: (rows, width), contiguous, rows of a multiple of 16 bytes; on the device, or pinned.
        indices: (tokens,) int64 on the device. A token whose index is out of range gets NaN.

    Returns:
        (tokens, width) of the table's type, on the device of `indices`.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    device = indices.device
    check(indices, "indices", shape=(None,), dtype=torch.int64, device=device, alignment_bytes=8)
    check(table, "table", shape=(None, None), dtype=table.dtype, device=_readable(table, "table", device))
    rows, width = table.shape
    check_multiple(width * table.element_size(), _PIECE_BYTES, "the number of bytes of a row of the table")
    out = torch.empty((len(indices), width), dtype=table.dtype, device=device)
    pieces = width * table.element_size() // _PIECE_BYTES
    warps = len(indices) * ceil_div(pieces, _PIECES_OF_A_WARP)
    if warps:
        launcher.launch(
            GATHER_ROWS,
            Geometry(grid=(ceil_div(warps, _WARPS), 1, 1), threads=32 * _WARPS),
            [table, indices, out, np.int64(len(indices)), np.int64(rows), np.int32(pieces)],
        )
    return out


def linear(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x times the weight transposed, plus bias, plus residual; up to 8 tokens read the weight in place.

    For more it is copied to the device first, on the current stream. Sums in float32, rounded once. In place,
    a token's result has the same bits whatever the others are.

    Args:
        x: (tokens, inputs) float16 or bfloat16; tokens may be strided; inputs a multiple of 8.
        weight: (outputs, inputs) on the device, or pinned; of x's type, or in layout `direct_v1`.
        bias: (outputs,) of x's type.
        residual: (tokens, outputs) of x's type, contiguous.

    Returns:
        (tokens, outputs) of x's type.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
        InvalidCheckpoint: the weight's layout or format has no kernel.
    """
    if isinstance(weight, PackedWeight):
        return low_bit_linear(launcher, x, _packed_at(weight, x), bias, residual)
    device = _readable(weight, "weight", x.device)
    if len(x) > TOKENS_IN_PLACE:
        out = torch.nn.functional.linear(x, weight.to(x.device, non_blocking=True), bias)
        return out if residual is None else out.add_(residual)
    return _gemv(launcher, x, weight, bias, residual, device)


def gemv_kernel(kind: str, tokens: int) -> Kernel:
    """For activations of type `f16` or `bf16` and up to 8 tokens."""
    most = next(most for most in (1, 2, 4, 8) if tokens <= most)
    return Kernel(source="host_gemv", name=f"host_gemv<{kind}, {most}>")


def _gemv(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    device: torch.device,
) -> Tensor:
    tokens, (outputs, inputs) = len(x), weight.shape
    check(x, "x", shape=(None, inputs), dtype=x.dtype, device=x.device, is_contiguous=False)
    check(weight, "weight", shape=(None, None), dtype=x.dtype, device=device)
    if inputs % 8 or x.stride(1) != 1 or (tokens > 1 and x.stride(0) % 8):
        raise ShapeMismatch(
            f"x has {inputs} inputs in rows {x.stride(0)} elements apart; both must be multiples of 8"
        )
    if bias is not None:
        check(bias, "bias", shape=(outputs,), dtype=x.dtype, device=x.device)
    if residual is not None:
        check(residual, "residual", shape=(tokens, outputs), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens:
        launcher.launch(
            gemv_kernel(type_name(x, "x"), tokens),
            Geometry(grid=(ceil_div(outputs, _WARPS), 1, 1), threads=32 * _WARPS),
            [
                weight,
                x,
                bias,
                residual,
                out,
                np.int32(tokens),
                np.int32(outputs),
                np.int32(inputs),
                np.int64(x.stride(0)),
            ],
        )
    return out


def _packed_at(weight: PackedWeight, x: Tensor) -> PackedWeight:
    """Codes that stay where they are for up to 8 tokens, else on x's device; factors are there."""
    words = weight.words
    _readable(words, "weight.words", x.device)
    return replace(
        weight,
        words=words if len(x) <= TOKENS_IN_PLACE else words.to(x.device, non_blocking=True),
        scales=weight.scales.to(x.device, non_blocking=True),
        zeros=None if weight.zeros is None else weight.zeros.to(x.device, non_blocking=True),
    )


def _readable(tensor: Tensor, name: str, device: torch.device) -> torch.device:
    """Where a tensor is, if kernels of a device can read it there.

    Raises:
        ShapeMismatch: they cannot.
    """
    if tensor.device != device and not (tensor.device.type == "cpu" and tensor.is_pinned()):
        raise ShapeMismatch(
            f"{name} is on {tensor.device}, not {device}, and not in pinned memory; pin it "
            f"(Tensor.pin_memory) or move it there"
        )
    return tensor.device
