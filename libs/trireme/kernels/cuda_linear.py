"""Linear layers with weights of 4, 6 and 8 bits on CUDA, decoded beside the tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.kernels.cuda_compile import UnsupportedGpu
from trireme.kernels.cuda_launch import Geometry, Kernel, Launcher, ShapeMismatch, ceil_div, check, type_name
from trireme.kernels.proven_kernels import is_proven
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
WGMMA_TOKENS: Final = 64
"""From so many tokens on wgmma multiplies, where there is some.

Reading a weight of b bits takes b / 8 / 4.8e12 s from an H200's memory. Multiplying it with N tokens takes
2 N / 990e12 s on its tensor cores by wgmma, at best, and by mma.sync 1.7 times that. With 6 bits mma.sync
takes longer than reading from 46 tokens on, wgmma from 77; between, reading is all that is left to wait for.
No card has settled it yet: `make bench-gpu` times both.
"""
WGMMA_TOKEN_TILES: Final = (64, 128)
"""Tokens that one block of wgmma works on; with groups, whose sums take registers too, the first only."""
_WARPGROUPS: Final = 3
"""Of a block of wgmma; each has 64 rows of the weight."""
_WGMMA_STAGES: Final = 4
_BANK_PADDING: Final = 4
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
    uses_wgmma: bool | None = None,
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
        uses_wgmma: whether wgmma multiplies, which adds in the same order; None: if the device has it and
            there are at least `WGMMA_TOKENS`, once it has shown that it is right there (`is_proven`).

    Returns:
        (tokens, outputs) of x's type.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
        InvalidCheckpoint: the weight's layout or format has no kernel.
        UnsupportedGpu: `uses_wgmma` on a device without it.
    """
    outputs, inputs = weight.shape
    tokens = x.shape[0]
    _check(x, weight, bias, residual)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    kind = type_name(x, "x")
    if uses_wgmma is None:
        by = functools.partial(low_bit_linear, launcher, x, weight, bias, residual, splits=splits)
        uses_wgmma = (
            launcher.has_wgmma
            and tokens >= WGMMA_TOKENS
            and is_proven(
                launcher,
                wgmma_block(kind, weight.form, tokens).kernel,
                special=lambda: by(uses_wgmma=True),
                general=lambda: by(uses_wgmma=False),
            )
        )
    if uses_wgmma and not launcher.has_wgmma:
        raise UnsupportedGpu(
            "wgmma takes a GPU of compute capability 9.0; leave the choice to low_bit_linear"
        )
    block = wgmma_block(kind, weight.form, tokens) if uses_wgmma else mma_block(kind, weight.form, tokens)
    row_blocks, token_blocks = ceil_div(outputs, block.rows), ceil_div(tokens, block.tokens)
    num_splits = splits or splits_for(outputs, inputs, multiprocessors=launcher.multiprocessors)
    partial = counters = None
    if num_splits > 1:
        counters = _counters(x.device, max(_MOST_COUNTERS, row_blocks * token_blocks))
        partial = torch.empty(
            (num_splits, token_blocks, row_blocks, block.tokens, block.rows),
            dtype=torch.float32,
            device=x.device,
        )
    launcher.launch(
        block.kernel,
        Geometry(
            grid=(row_blocks, token_blocks, num_splits),
            threads=block.threads,
            shared_bytes=block.shared_bytes,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmBlock:
    """What one block of a product does."""

    kernel: Kernel
    rows: int
    """Of the weight."""
    tokens: int
    threads: int
    shared_bytes: int


def mma_block(kind: str, form: WeightFormat, tokens: int) -> GemmBlock:
    """For a product by mma.sync, on any GPU.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    tile = token_tile(tokens)
    return GemmBlock(
        kernel=gemm_kernel(kind, form, tile),
        rows=_TILE,
        tokens=tile,
        threads=32 * WARPS,
        shared_bytes=stage_bytes(form.bits, tile),
    )


def wgmma_block(kind: str, form: WeightFormat, tokens: int) -> GemmBlock:
    """For a product by wgmma, on compute capability 9.0.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    small, large = WGMMA_TOKEN_TILES
    tile = small if form.group_size or tokens <= small else large
    rows = _WARPGROUPS * _TILE
    stages = _WGMMA_STAGES * (2 * _TILE * tile + _WARPGROUPS * _TILE * _TILE * form.bits // 8)
    return GemmBlock(
        kernel=wgmma_kernel(kind, form, tile),
        rows=rows,
        tokens=tile,
        threads=_WARPGROUPS * 128,
        shared_bytes=stages + 4 * tile * (rows + _BANK_PADDING),
    )


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
    return _kernel("low_bit_gemm", kind, form, tile)


def wgmma_kernel(kind: str, form: WeightFormat, tile: int) -> Kernel:
    """As `gemm_kernel`, by wgmma: for compute capability 9.0 alone.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    return _kernel("sm90_low_bit_gemm", kind, form, tile)


def _kernel(source: str, kind: str, form: WeightFormat, tile: int) -> Kernel:
    codes = code_name(form)
    return Kernel(source=source, name=f"{source}<{kind}, {codes}<{kind}>, {form.group_size or 0}, {tile}>")


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
