"""Paged attention on CUDA: decoding sequences, prefill chunks and trees of speculated tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_launch import (
    CODE_NAMES,
    SCALE_BYTES,
    TYPE_NAMES,
    Argument,
    Geometry,
    Kernel,
    Launcher,
    ShapeMismatch,
    ceil_div,
    check,
    type_name,
)
from trireme.kernels.static_decodes import StaticDecodes
from trireme.kernels.tree_paths import MAX_TREE_TOKENS

HEAD_DIMS: Final = (16, 32, 64, 80, 96, 128)
"""Head dimensions that `paged_attention` takes."""
_ROWS_OF_A_WARP: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """How a decoding sequence's keys are split over blocks; a function of its own length alone."""

    unit: int = 512
    """Keys; splits are multiples of it. A multiple of 64."""
    most: int = 16
    """Splits of one sequence; longer sequences have longer splits."""

    def splits(self, context: int) -> int:
        """Splits of a sequence of `context` tokens."""
        return ceil_div(context, self.unit * ceil_div(context, self.unit * self.most))

    def splits_up_to(self, context: int) -> int:
        """Splits of a sequence of at most `context` tokens: longer ones may have fewer."""
        return min(self.most, ceil_div(context, self.unit))


_SPLITS: Final = SplitRule()


def takes(q: Tensor, k_cache: Tensor, batch: AttentionBatch) -> bool:
    """Whether `paged_attention` takes queries (tokens, heads, head_dim) and a cache like these."""
    is_power = batch.block_size & (batch.block_size - 1) == 0
    begin_here = all(batch.query_lens[index] == len(tree) for index, tree in batch.trees.items())
    is_typed = q.dtype in TYPE_NAMES and k_cache.dtype in (q.dtype, *CODE_NAMES)
    return is_typed and q.shape[2] in HEAD_DIMS and is_power and begin_here


def paged_attention(
    launcher: Launcher,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tree_masks: Tensor | None = None,
    splits: SplitRule = _SPLITS,
) -> Tensor:
    """Causal attention of one step's queries over the paged cache, as `kernels.ops.paged_attention`.

    A query's result has the same bits whatever the batch around it; a prefill query's, too, however its
    prompt is cut into chunks of two tokens and more.

    Args:
        q: (tokens, heads, head_dim) float16 or bfloat16; tokens may be strided, head_dim one of `HEAD_DIMS`.
        k_cache, v_cache: (blocks, block_size, kv_heads, row), contiguous, of q's type or in 8 bits
            (`kernels.kv_forms`): row is head_dim, or 4 more. block_size is a power of two.
        batch: which tokens belong to which sequence, and where its blocks lie.
        scale: factor on the dot products.
        window: a query at position p sees keys at positions > p - window; None: all up to p.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
        tree_masks: (tokens,) int64 seen as bits; bit j says that a token sees the j-th token of its sequence
            in this step: itself and its ancestors. Its position is its depth behind the cached tokens. They
            hold for the batch's trees or, if it names none, for all its chunks, which then have at most 64
            tokens. None: each sees all before it.
        splits: how a decoding sequence's keys are split over blocks.

    Returns:
        (tokens, heads * head_dim), contiguous.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    _check(q, k_cache, v_cache, batch, tree_masks)
    out = torch.empty((tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    plan = _static_plan(batch, group) if isinstance(batch, StaticDecodes) else _plan(batch, group)
    kind = type_name(q, "q")
    shared_bytes = 512 * (head_dim + 8)
    for part in plan.parts:
        num_splits = part.num_splits(splits)
        masks = tree_masks if part.has_trees else None
        partial = _Partial.empty(num_splits, plan.num_decodes, heads, head_dim, q.device)
        arguments: list[Argument] = [
            q,
            k_cache,
            v_cache,
            plan.block_tables,
            plan.sequences,
            part.tiles,
            masks,
            out,
            partial.sums_of_values,
            partial.maxima,
            partial.sums,
            np.int32(heads),
            np.int32(kv_heads),
            np.int32(plan.block_tables.shape[1]),
            np.int32(batch.block_size.bit_length() - 1),
            np.int32(window or 0),
            np.int32(splits.unit),
            np.int32(splits.most if part.row_warps == 1 else 1),
            np.int32(plan.num_decodes),
            np.int64(q.stride(0)),
            np.float32(scale),
            np.float32(soft_cap or 0.0),
        ]
        launcher.launch(
            attention_kernel(kind, head_dim, part.row_warps, CODE_NAMES.get(k_cache.dtype, kind)),
            Geometry(
                grid=(part.tiles.shape[0], kv_heads, num_splits), threads=128, shared_bytes=shared_bytes
            ),
            arguments,
        )
        if num_splits > 1:
            rows = plan.num_decodes * heads
            launcher.launch(
                merge_kernel(kind, head_dim),
                Geometry(grid=(ceil_div(rows, 4), 1, 1), threads=128),
                [
                    partial.sums_of_values,
                    partial.maxima,
                    partial.sums,
                    out,
                    np.int64(rows),
                    np.int32(num_splits),
                ],
            )
    return out


def attention_kernel(kind: str, head_dim: int, row_warps: int, stored: str | None = None) -> Kernel:
    """Of element type `f16` or `bf16`; row_warps 1 for decoding, 4 for prefill; stored: the cache's type."""
    arguments = f"{kind}, {stored or kind}, {head_dim}, {row_warps}"
    return Kernel(source="paged_attention", name=f"paged_attention<{arguments}>")


def merge_kernel(kind: str, head_dim: int) -> Kernel:
    """Merges the splits of decoding sequences."""
    return Kernel(source="paged_attention", name=f"merge_splits<{kind}, {head_dim}>")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Sequences that one launch is for."""

    row_warps: int
    has_trees: bool
    """Of its sequences' tokens the masks say what they see, if there are masks."""
    tiles: Tensor
    """(tiles, 2) int32: sequence, first row."""
    contexts: Sequence[int]
    is_bound: bool = False
    """Contexts are what they may be at most."""

    def num_splits(self, rule: SplitRule) -> int:
        if self.row_warps > 1:
            return 1
        return max(map(rule.splits_up_to if self.is_bound else rule.splits, self.contexts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    block_tables: Tensor
    """(sequences, blocks) int32."""
    sequences: Tensor
    """(sequences, 3) int32: first token, tokens in this step, tokens in the cache."""
    parts: tuple[_Part, ...]
    num_decodes: int


@dataclass(frozen=True, slots=True)
class _Partial:
    """What splits leave for the merge; nothing if there is one split."""

    sums_of_values: Tensor | None
    maxima: Tensor | None
    sums: Tensor | None

    @staticmethod
    def empty(splits: int, tokens: int, heads: int, head_dim: int, device: torch.device) -> _Partial:
        if splits == 1:
            return _Partial(None, None, None)
        values = torch.empty((splits, tokens, heads, head_dim), dtype=torch.float32, device=device)
        maxima, sums = torch.empty((2, splits, tokens, heads), dtype=torch.float32, device=device)
        return _Partial(values, maxima, sums)


@functools.lru_cache(maxsize=2)
def _plan(batch: AttentionBatch, group: int) -> _Plan:
    """What all layers of a step share; kept for the newest steps."""
    lengths = np.asarray(batch.query_lens, dtype=np.int32)
    contexts = np.asarray(batch.context_lens, dtype=np.int32)
    firsts = np.cumsum(lengths) - lengths
    parts = []
    chunks = range(batch.num_decodes, len(lengths))
    trees = sorted(batch.trees) or chunks
    others = [sequence for sequence in chunks if batch.trees and sequence not in batch.trees]
    for row_warps, has_trees, sequences in (
        (1, False, range(batch.num_decodes)),
        (4, False, others),
        (4, True, trees),
    ):
        if not sequences:
            continue
        rows = _ROWS_OF_A_WARP * row_warps
        tiles = [
            (sequence, first)
            for sequence in sequences
            for first in range(0, int(lengths[sequence]) * group, rows)
        ]
        parts.append(
            _Part(
                row_warps=row_warps,
                has_trees=has_trees,
                tiles=_to_device(np.asarray(tiles, dtype=np.int32), batch),
                contexts=contexts[list(sequences)].tolist(),
            )
        )
    return _Plan(
        block_tables=_to_device(np.ascontiguousarray(batch.block_tables, dtype=np.int32), batch),
        sequences=_to_device(np.stack((firsts, lengths, contexts), 1).astype(np.int32), batch),
        parts=tuple(parts),
        num_decodes=batch.num_decodes,
    )


def _static_plan(batch: StaticDecodes, group: int) -> _Plan:
    part = _Part(
        row_warps=1,
        has_trees=False,
        tiles=batch.tiles(_ROWS_OF_A_WARP, group),
        contexts=batch.context_lens[:1],
        is_bound=True,
    )
    return _Plan(
        block_tables=batch.tables, sequences=batch.sequences, parts=(part,), num_decodes=batch.num_decodes
    )


def _to_device(array: NDArray[np.int32], batch: AttentionBatch) -> Tensor:
    return torch.from_numpy(array).to(batch.device, non_blocking=True)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, tree_masks: Tensor | None
) -> None:
    tokens, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ShapeMismatch(f"head_dim is {head_dim}; paged attention is built for {HEAD_DIMS}")
    if batch.block_size & (batch.block_size - 1):
        raise ShapeMismatch(f"block_size is {batch.block_size}; paged attention takes powers of two")
    if tokens != batch.num_tokens or heads % k_cache.shape[2]:
        raise ShapeMismatch(
            f"q has {tokens} tokens and {heads} heads; the batch has {batch.num_tokens} tokens and the cache "
            f"{k_cache.shape[2]} heads, of which the queries' must be a multiple"
        )
    check(
        q, "q", shape=(tokens, heads, head_dim), dtype=q.dtype, device=batch.slots.device, is_contiguous=False
    )
    if q.stride(2) != 1 or (heads > 1 and q.stride(1) != head_dim) or q.stride(0) % 8:
        raise ShapeMismatch("the heads of a token of q do not lie side by side at a multiple of 16 bytes")
    blocks = k_cache.shape[0]
    is_coded = k_cache.dtype in CODE_NAMES
    row = head_dim + SCALE_BYTES if is_coded else head_dim
    cache_shape = (blocks, batch.block_size, k_cache.shape[2], row)
    for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        check(cache, name, shape=cache_shape, dtype=k_cache.dtype if is_coded else q.dtype, device=q.device)
    if tree_masks is not None:
        check(tree_masks, "tree_masks", shape=(tokens,), dtype=torch.int64, device=q.device)
        longest = max(batch.query_lens[index] for index in batch.trees or range(len(batch.query_lens)))
        if longest > MAX_TREE_TOKENS:
            raise ShapeMismatch(f"a tree has {longest} tokens; {MAX_TREE_TOKENS} fit a mask, so draft fewer")
