"""Keys and values on CUDA: rotated with their queries, written to their pages, copied by blocks.

Tensors are float16 or bfloat16 unless it says otherwise; `launcher` is the device they are on. Arithmetic is
in float32, each result is rounded once.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from trireme.kernels.cuda_launch import (
    CODE_NAMES,
    SCALE_BYTES,
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

_PIECE_BYTES: Final = 4096


def rotary(launcher: Launcher, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of each head by the token's angles, as `kernels.ops.rotary`; tokens may be strided."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotary_append(launcher, x, None, cos, sin, out, None)
    return out


def rotary_append_kv(
    launcher: Launcher,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the paged cache, in one pass.

    Args:
        q: (tokens, heads, head_dim), head_dim a multiple of 16; tokens may be strided, as slices of one
            projection are.
        k, v: (tokens, kv_heads, head_dim); likewise.
        cos, sin: (tokens, 1, head_dim), as for `kernels.ops.rotary`.
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim), contiguous.
        slots: (tokens,) int64, block * block_size + offset; -1 skips; distinct.

    Returns:
        The rotated queries, (tokens, heads, head_dim), contiguous.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _rotary_append(launcher, q, (k, v, k_cache, v_cache, slots), cos, sin, out, slots)
    return out


def _rotary_append(
    launcher: Launcher,
    q: Tensor,
    cached: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    slots: Tensor | None,
) -> None:
    tokens, heads, head_dim = q.shape
    check_multiple(head_dim, 16, "head_dim")
    for angles, name in ((cos, "cos"), (sin, "sin")):
        check(angles, name, shape=(tokens, 1, head_dim), dtype=q.dtype, device=q.device)
    _check_heads(q, "q", tokens, head_dim, q)
    k = v = k_cache = v_cache = None
    kv_heads = 0
    if cached is not None:
        k, v, k_cache, v_cache, slots = cached
        kv_heads = k.shape[1]
        _check_cache(q, k, v, k_cache, v_cache, slots)
    if tokens == 0:
        return
    launcher.launch(
        Kernel(source="rotary_append_kv", name=f"rotary_append_kv<{type_name(q, 'q')}>"),
        Geometry(grid=(tokens, 1, 1), threads=128),
        [
            q,
            k,
            v,
            cos,
            sin,
            slots,
            out,
            k_cache,
            v_cache,
            np.int32(heads),
            np.int32(kv_heads),
            np.int32(head_dim),
            np.int64(q.stride(0)),
            np.int64(0 if k is None else k.stride(0)),
            np.int64(0 if v is None else v.stride(0)),
        ],
    )


def append_kv(
    launcher: Launcher, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Write one step's keys and values into the paged cache, as `kernels.ops.append_kv`; slot -1 skips.

    The cache is of the keys' type, or in 8 bits (`kernels.kv_forms`).

    Raises:
        ShapeMismatch: a shape, type, device or layout differs; kv_heads * head_dim is no multiple of 8.
    """
    if k_cache.dtype in CODE_NAMES:
        _append_coded(launcher, k_new, v_new, k_cache, v_cache, slots)
        return
    _check_cache(k_new, k_new, v_new, k_cache, v_cache, slots)
    tokens, kv_heads, head_dim = k_new.shape
    row = kv_heads * head_dim
    check_multiple(row, 8, "kv_heads * head_dim")
    if tokens == 0:
        return
    launcher.launch(
        Kernel(source="append_kv", name=f"append_kv<{type_name(k_new, 'k_new')}>"),
        Geometry(grid=(ceil_div(tokens, 4), 1, 1), threads=128),
        [
            k_new,
            v_new,
            slots,
            k_cache,
            v_cache,
            np.int32(tokens),
            np.int32(row),
            np.int64(k_new.stride(0)),
            np.int64(v_new.stride(0)),
        ],
    )


def append_coded_kernel(kind: str, code: str) -> Kernel:
    """From element type `f16` or `bf16` to one of `CODE_NAMES`."""
    return Kernel(source="append_coded_kv", name=f"append_coded_kv<{kind}, {code}>")


def _append_coded(
    launcher: Launcher, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    tokens, kv_heads, head_dim = k_new.shape
    check_multiple(head_dim, 4, "head_dim")
    _check_cache(k_new, k_new, v_new, k_cache, v_cache, slots, row=head_dim + SCALE_BYTES)
    if tokens == 0:
        return
    launcher.launch(
        append_coded_kernel(type_name(k_new, "k_new"), CODE_NAMES[k_cache.dtype]),
        Geometry(grid=(ceil_div(tokens * kv_heads, 4), 1, 1), threads=128),
        [
            k_new,
            v_new,
            slots,
            k_cache,
            v_cache,
            np.int32(tokens),
            np.int32(kv_heads),
            np.int32(head_dim),
            np.int64(k_new.stride(0)),
            np.int64(v_new.stride(0)),
        ],
    )


def copy_blocks(
    launcher: Launcher,
    source: Tensor,
    target: Tensor,
    *,
    source_blocks: Tensor | None = None,
    target_blocks: Tensor | None = None,
) -> None:
    """Copy blocks of one layer's cache: gather (`source_blocks`), scatter (`target_blocks`), or both.

    Args:
        source, target: (blocks, ...) of any type, contiguous; equal but for the number of blocks.
        source_blocks, target_blocks: (count,) int64; None: the first `count` in order. At least one is given;
            what `target_blocks` names is distinct.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs, or a block's bytes are no multiple of 16.
    """
    check(source, "source", shape=(None, *target.shape[1:]), dtype=target.dtype, device=target.device)
    check(target, "target", shape=tuple(target.shape), dtype=target.dtype, device=target.device)
    given = [blocks for blocks in (source_blocks, target_blocks) if blocks is not None]
    if not given:
        raise ShapeMismatch(
            "copy_blocks needs source_blocks or target_blocks: they say how many blocks to copy"
        )
    count = given[0].shape[0]
    for blocks in given:
        check(blocks, "the list of blocks", shape=(count,), dtype=torch.int64, device=target.device)
    block_bytes = target[0].numel() * target.element_size()
    check_multiple(block_bytes, 16, "the bytes of a block")
    if count and block_bytes:
        launcher.launch(
            Kernel(source="copy_blocks", name="copy_blocks"),
            Geometry(grid=(ceil_div(block_bytes, _PIECE_BYTES), count, 1), threads=256),
            [source, target, source_blocks, target_blocks, np.int64(block_bytes)],
        )


def _check_heads(x: Tensor, name: str, tokens: int, head_dim: int, like: Tensor) -> None:
    check(
        x,
        name,
        shape=(tokens, None, head_dim),
        dtype=like.dtype,
        device=like.device,
        is_contiguous=False,
    )
    if x.shape[1] > 1 and x.stride(1) != head_dim:
        raise ShapeMismatch(f"the heads of a token of {name} do not lie side by side")
    check_rows(x, name)


def _check_cache(
    like: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    row: int | None = None,
) -> None:
    """`row`: elements of a coded row; None: the cache has plain numbers of the keys' type."""
    tokens, kv_heads, head_dim = k.shape
    for new, name in ((k, "k"), (v, "v")):
        _check_heads(new, name, like.shape[0], like.shape[2], like)
    check(
        v, "v", shape=(tokens, kv_heads, head_dim), dtype=like.dtype, device=like.device, is_contiguous=False
    )
    check(slots, "slots", shape=(tokens,), dtype=torch.int64, device=like.device)
    blocks, block_size = k_cache.shape[:2]
    for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        check(
            cache,
            name,
            shape=(blocks, block_size, kv_heads, row or head_dim),
            dtype=k_cache.dtype if row else like.dtype,
            device=like.device,
        )
