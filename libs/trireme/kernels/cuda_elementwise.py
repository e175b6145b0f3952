"""Norms and SwiGLU on CUDA.

Tensors are float16 or bfloat16 unless it says otherwise; `launcher` is the device they are on. Arithmetic is
in float32, each result is rounded once.
"""

from __future__ import annotations

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
    check_rows,
    type_name,
)

_ROWS_OF_A_WARP: Final = 1024
"""Rows up to this width are a warp's, wider ones a block's."""


def rms_norm(launcher: Launcher, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square, times `weight`, as `kernels.ops.rms_norm`.

    Args:
        x: (..., width), rows evenly spaced; width a multiple of 8.
        weight: (width,), or (n, width) where n is the size of x's last dimension but one.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    width = x.shape[-1]
    rows = _evenly_spaced_rows(x, "x")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm(launcher, rows, None, weight, out.view(-1, width), eps)
    return out


def add_rms_norm(launcher: Launcher, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to the residual, in place, and return the sum's `rms_norm`.

    Args:
        x, residual: (tokens, width), the residual contiguous; the sum is rounded to their type first.
        weight: (width,).

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.

    Source: DeepSpeed-Inference, SC 2022 (Deep-Fusion: residual and norm in one pass).
    """
    check(residual, "residual", shape=tuple(x.shape), dtype=x.dtype, device=x.device)
    out = torch.empty_like(residual)
    _rms_norm(launcher, _evenly_spaced_rows(x, "x"), residual, weight, out, eps)
    return out


def _rms_norm(
    launcher: Launcher, x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float
) -> None:
    rows, width = x.shape
    weights = weight.view(-1, width) if weight.is_contiguous() and weight.shape[-1] == width else weight
    check(weights, "weight", shape=(None, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return
    warps = 1 if width <= _ROWS_OF_A_WARP else 8
    launcher.launch(
        Kernel(source="rms_norm", name=f"rms_norm<{type_name(x, 'x')}, {warps}>"),
        Geometry(grid=(ceil_div(rows, 8 // warps), 1, 1), threads=256, shared_bytes=4 * 8),
        [
            x,
            residual,
            weights,
            out,
            np.int32(rows),
            np.int32(width),
            np.int64(x.stride(0)),
            np.int32(weights.shape[0]),
            np.float32(eps),
        ],
    )


def swiglu(launcher: Launcher, gate_up: Tensor) -> Tensor:
    """silu(gate) * up, as `kernels.ops.swiglu`: (tokens, 2 * width) to (tokens, width).

    Raises:
        ShapeMismatch: not contiguous, or the width is no multiple of 8.
    """
    check(gate_up, "gate_up", shape=(None, None), dtype=gate_up.dtype, device=gate_up.device)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    check_multiple(gate_up.shape[1], 16, "the width of gate_up")
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        launcher.launch(
            Kernel(source="swiglu", name=f"swiglu<{type_name(gate_up, 'gate_up')}>"),
            Geometry(grid=(ceil_div(tokens * width // 8, 256), 1, 1), threads=256),
            [gate_up, out, np.int64(tokens), np.int32(width)],
        )
    return out


def _evenly_spaced_rows(x: Tensor, name: str) -> Tensor:
    """x (..., width) as (rows, width), without a copy."""
    check_multiple(x.shape[-1], 8, f"the width of {name}")
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ShapeMismatch(f"the rows of {name} are not evenly spaced; make it contiguous") from None
    check_rows(rows, name)
    return rows
