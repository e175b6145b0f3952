"""Linear layers with weights of 4, 6 and 8 bits on CUDA, decoded beside the tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.kernels.cuda_launch import Geometry, Kernel, Launcher, ShapeMismatch, ceil_div, check, type_name
from trireme.quant.device_layouts import DIRECT, PackedWeight
from trireme.quant.formats import WeightFormat
from trireme.quant.minifloat import FP5_E2M2, FP6_E2M3, FP6_E3M2, Minifloat

TOKEN_TILES: Final = (8, 16, 32)
"""Tokens that one block works on."""
_STAGES: Final = {8: 4, 16: 3, 32: 2}
WARPS: Final = 4
"""Of a block."""
_TILE: Final = 64
_MOST_COUNTERS: Final = 1 << 14
_TILES_OF_A_WARP: Final = 2
"""A split leaves each warp at least as many tiles of 64 columns."""
_BLOCKS_A_MULTIPROCESSOR: Final = 2
_CODE_NAMES: Final[Mapping[Minifloat | int, str]] = {
    FP6_E3M2: "Fp6E3M2",
    FP6_E2M3: "Fp6E2M3",
    FP5_E2M2: "Fp5E2M2",
    8: "Int8",
    4: "Int4",
}
"""By the values that codes stand for, or the bits of integers."""


def low_bit_linear(
    launcher: Launcher,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """x times the weight transposed, plus bias, plus residual; sums in float32, rounded once.

    A token's result has the same bits whatever the other tokens are. All calls of a device are of one stream.

    Args:
        x: (tokens, inputs) float16 or bfloat16; tokens may be strided; inputs a multiple of 8.
        weight: (outputs, inputs) in layout `direct_v1`, its tensors on x's device; its words may be in pinned
            host memory, of which each tile of tokens reads all.
        bias: (outputs,) of x's type.
        residual: (tokens, outputs) of x's type, contiguous.
        splits: parts that the inputs are cut into, for different blocks; None: what keeps the device busy.

    Returns:
        (tokens, outputs) of x's type.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
        InvalidCheckpoint: the weight's layout or format has no kernel.
    """
    outputs, inputs = weight.shape
    tokens = x.shape[0]
    _check(x, weight, bias, residual)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    tile = token_tile(tokens)
    row_tiles, token_tiles = ceil_div(outputs, _TILE), ceil_div(tokens, tile)
    num_splits = splits or splits_for(outputs, inputs, multiprocessors=launcher.multiprocessors)
    partial = counters = None
    if num_splits > 1:
        counters = _counters(x.device, max(_MOST_COUNTERS, row_tiles * token_tiles))
        partial = torch.empty(
            (num_splits, token_tiles, row_tiles, tile, _TILE), dtype=torch.float32, device=x.device
        )
    launcher.launch(
        gemm_kernel(type_name(x, "x"), weight.form, tile),
        Geometry(
            grid=(row_tiles, token_tiles, num_splits),
            threads=32 * WARPS,
            shared_bytes=stage_bytes(weight.form.bits, tile),
        ),
        [
            weight.words,
            weight.scales,
            weight.zeros,
            x,
            bias,
            residual,
            out,
            partial,
            counters,
            np.int32(tokens),
            np.int32(outputs),
            np.int32(inputs),
            np.int64(x.stride(0)),
        ],
    )
    return out


def token_tile(tokens: int) -> int:
    """Tokens of a block in a batch of so many."""
    return next((tile for tile in TOKEN_TILES if tokens <= tile), TOKEN_TILES[-1])


def splits_for(outputs: int, inputs: int, *, multiprocessors: int) -> int:
    """Parts to cut the inputs into: a function of the weight alone, so results do not depend on the batch."""
    row_tiles, column_tiles = ceil_div(outputs, _TILE), ceil_div(inputs, _TILE)
    wanted = ceil_div(_BLOCKS_A_MULTIPROCESSOR * multiprocessors, row_tiles)
    return max(1, min(wanted, column_tiles // (WARPS * _TILES_OF_A_WARP)))


def takes(form: WeightFormat) -> bool:
    """Whether there is a kernel for weights of a format."""
    return (form.minifloat or form.bits) in _CODE_NAMES


def gemm_kernel(kind: str, form: WeightFormat, tile: int) -> Kernel:
    """For activations of type `f16` or `bf16`, weights of a format, and blocks of `tile` tokens.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    codes = code_name(form)
    return Kernel(
        source="low_bit_gemm", name=f"low_bit_gemm<{kind}, {codes}<{kind}>, {form.group_size or 0}, {tile}>"
    )


def code_name(form: WeightFormat) -> str:
    """A format as `csrc/cuda/weight_codes.cuh` calls it.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    found = _CODE_NAMES.get(form.minifloat or form.bits)
    if found is None:
        raise InvalidCheckpoint(f"there is no CUDA kernel for {form.name}; use fp6, fp5, int8_ch or int4")
    return found


def stage_bytes(bits: int, tile: int) -> int:
    """Shared memory of a block's stages, for weights of so many bits and blocks of `tile` tokens."""
    is_wide = bits == 16
    return WARPS * (2 if is_wide else _STAGES[tile]) * (512 * bits + (128 if is_wide else 144) * tile)


@functools.lru_cache(maxsize=8)
def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros that each launch leaves as zeros."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None) -> None:
    outputs, inputs = weight.shape
    tokens = x.shape[0]
    if weight.layout != DIRECT:
        raise InvalidCheckpoint(f"layout {weight.layout} has no CUDA kernel; pack the weight as {DIRECT}")
    check(x, "x", shape=(tokens, inputs), dtype=x.dtype, device=x.device, is_contiguous=False)
    if inputs % 8 or x.stride(1) != 1 or (tokens > 1 and x.stride(0) % 8):
        raise ShapeMismatch(
            f"x has {inputs} inputs in rows {x.stride(0)} elements apart; both must be multiples of 8"
        )
    padded = tuple(ceil_div(size, _TILE) * _TILE for size in weight.shape)
    words = padded[0] * padded[1] * weight.form.bits // 32
    is_pinned = weight.words.device.type == "cpu" and weight.words.is_pinned()
    words_device = weight.words.device if is_pinned else x.device
    check(weight.words, "weight.words", shape=(words,), dtype=torch.int32, device=words_device)
    group = weight.form.group_size
    per_scale = (padded[0],) if group is None else (padded[0], ceil_div(padded[1], group))
    check(weight.scales, "weight.scales", shape=per_scale, dtype=torch.float32, device=x.device)
    if weight.zeros is not None:
        check(weight.zeros, "weight.zeros", shape=per_scale, dtype=torch.uint8, device=x.device)
    if bias is not None:
        check(bias, "bias", shape=(outputs,), dtype=x.dtype, device=x.device)
    if residual is not None:
        check(residual, "residual", shape=(tokens, outputs), dtype=x.dtype, device=x.device)
