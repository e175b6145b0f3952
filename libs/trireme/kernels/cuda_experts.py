"""Mixtures of experts on CUDA: a token's experts, which tokens each has, all their products in one launch.

Nothing here waits for the GPU to learn which experts were chosen, so a step can be captured in a graph. A
token's result has the same bits whatever the other tokens are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.kernels import cuda_elementwise
from trireme.kernels.cuda_expert_weights import PackedExperts
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
from trireme.kernels.cuda_linear import WARPS, code_name, stage_bytes, token_tile
from trireme.quant.formats import WeightFormat

MOST_EXPERTS: Final = 512
MOST_CHOSEN: Final = 32
"""Of one token."""
GROUP_BY_EXPERT: Final = Kernel(source="group_by_expert", name="group_by_expert")
_TILE: Final = 64
_PLACES_OF_A_WARP: Final = 64
_MOST_WARPS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertGroups:
    """Which tokens each expert works on; position p of a group is choice `order[p]` of the batch."""

    tile: int
    """Positions that one block works on at most."""
    order: Tensor
    """(tokens * chosen,) int32: choice t * chosen + i is the i-th of token t; by expert, then by choice."""
    tokens: Tensor
    """(tokens * chosen,) int32: whose choice it is."""
    tiles: Tensor
    """(tiles, 3) int32: expert, first position, the one past its last; -1, 0, 0: not needed."""


def takes(num_experts: int, num_chosen: int) -> bool:
    """Whether there are kernels for so many experts, of which a token chooses so many."""
    return 1 <= num_chosen <= min(num_experts, MOST_CHOSEN) and num_experts <= MOST_EXPERTS


def choose_experts(
    launcher: Launcher, logits: Tensor, *, num_chosen: int, renormalises: bool
) -> tuple[Tensor, Tensor]:
    """The experts with the largest logits, of equals the first, and their shares of a softmax in float32.

    Args:
        logits: (tokens, experts) float16 or bfloat16, contiguous; at most 512 experts.
        num_chosen: of a token, at most 32.
        renormalises: the softmax is over the chosen ones; else over all.

    Returns:
        Shares (tokens, num_chosen) of the logits' type, experts int64 of the same shape, best first. NaN
        counts as the largest logit, and makes its token's shares NaN.

    Raises:
        ShapeMismatch: a shape, type or number differs from the above.
    """
    check(logits, "logits", shape=(None, None), dtype=logits.dtype, device=logits.device, alignment_bytes=2)
    tokens, num_experts = logits.shape
    _check_counts(num_experts, num_chosen)
    shares = torch.empty((tokens, num_chosen), dtype=logits.dtype, device=logits.device)
    experts = torch.empty((tokens, num_chosen), dtype=torch.int64, device=logits.device)
    if tokens:
        launcher.launch(
            choosing_kernel(type_name(logits, "logits"), num_experts),
            Geometry(grid=(ceil_div(tokens, 4), 1, 1), threads=128),
            [
                logits,
                shares,
                experts,
                np.int32(tokens),
                np.int32(num_experts),
                np.int32(num_chosen),
                np.int32(renormalises),
            ],
        )
    return shares, experts


def group_by_expert(
    launcher: Launcher, experts: Tensor, *, num_experts: int, tile: int | None = None
) -> ExpertGroups:
    """Sort a batch's choices by expert, and cut each expert's into tiles.

    Args:
        experts: (tokens, chosen) int64, contiguous, from 0 to num_experts - 1; at least one token.
        num_experts: at most 512.
        tile: 8, 16 or 32; None: what suits the mean of the experts.

    Raises:
        ShapeMismatch: a shape, type or number differs from the above.
    """
    check(
        experts,
        "experts",
        shape=(None, None),
        dtype=torch.int64,
        device=experts.device,
        alignment_bytes=8,
    )
    chosen = experts.shape[1]
    _check_counts(num_experts, chosen)
    places, busy = experts.numel(), min(num_experts, experts.numel())
    tile = tile or token_tile(ceil_div(places, busy))
    most_tiles = (places + busy * (tile - 1)) // tile
    groups = ExpertGroups(
        tile=tile,
        order=torch.empty(places, dtype=torch.int32, device=experts.device),
        tokens=torch.empty(places, dtype=torch.int32, device=experts.device),
        tiles=torch.empty((most_tiles, 3), dtype=torch.int32, device=experts.device),
    )
    warps = min(_MOST_WARPS, ceil_div(places, _PLACES_OF_A_WARP))
    launcher.launch(
        GROUP_BY_EXPERT,
        Geometry(grid=(1, 1, 1), threads=32 * warps, shared_bytes=4 * num_experts * (warps + 3)),
        [
            experts,
            groups.order,
            groups.tokens,
            groups.tiles,
            np.int32(places),
            np.int32(num_experts),
            np.int32(num_experts.bit_length()),
            np.int32(chosen),
            np.int32(tile),
            np.int32(most_tiles),
        ],
    )
    return groups


def expert_linear(
    launcher: Launcher,
    x: Tensor,
    weights: PackedExperts,
    groups: ExpertGroups,
    *,
    sources: Tensor | None,
    targets: Tensor | None,
) -> Tensor:
    """Each expert's tokens times its matrix transposed; sums in float32, rounded once.

    Args:
        x: (rows, inputs) float16 or bfloat16, contiguous; inputs a multiple of 8.
        weights: on x's device; 16-bit ones of x's type.
        groups: of the batch.
        sources: (positions,) int32, the row of x of each position; None: the position itself.
        targets: (positions,) int32, the row of the result of each; None: likewise. Distinct.

    Returns:
        (positions, outputs) of x's type.

    Raises:
        ShapeMismatch: a shape, type or device differs from the above.
        InvalidCheckpoint: the weights' format has no kernel.
    """
    outputs, inputs = weights.shape
    positions = len(groups.order)
    check(x, "x", shape=(positions if sources is None else None, inputs), dtype=x.dtype, device=x.device)
    check_multiple(inputs, 8, "the number of inputs")
    kind = type_name(x, "x")
    _check_weights(weights, x)
    out = torch.empty((positions, outputs), dtype=x.dtype, device=x.device)
    launcher.launch(
        expert_kernel(kind, weights.form, groups.tile),
        Geometry(
            grid=(len(groups.tiles), ceil_div(outputs, _TILE), 1),
            threads=32 * WARPS,
            shared_bytes=stage_bytes(weights.bits, groups.tile) + 4 * groups.tile,
        ),
        [
            weights.words,
            weights.scales,
            weights.zeros,
            x,
            sources,
            targets,
            groups.tiles,
            out,
            np.int32(outputs),
            np.int32(inputs),
        ],
    )
    return out


def mixture_add(
    launcher: Launcher,
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    residual: Tensor,
) -> Tensor:
    """What a token's experts make of it, weighted, plus residual, as `kernels.ops.mixture_add`.

    What an expert makes between its products, and at its end, is rounded to x's type; the rest is float32,
    rounded once.

    Args:
        x, residual: (tokens, hidden) float16 or bfloat16, contiguous.
        shares: (tokens, chosen) of x's type, contiguous.
        experts: (tokens, chosen) int64, contiguous, in range.
        gate_up: (2 * inner, hidden) of each expert: gate first.
        down: (hidden, inner) of each expert.

    Raises:
        ShapeMismatch: a shape, type or device differs from the above.
    """
    tokens, hidden = x.shape
    check(x, "x", shape=(None, gate_up.shape[1]), dtype=x.dtype, device=x.device)
    check(residual, "residual", shape=(tokens, down.shape[0]), dtype=x.dtype, device=x.device)
    check(shares, "shares", shape=(tokens, None), dtype=x.dtype, device=x.device, alignment_bytes=2)
    chosen = shares.shape[1]
    check(
        experts,
        "experts",
        shape=(tokens, chosen),
        dtype=torch.int64,
        device=x.device,
        alignment_bytes=8,
    )
    if gate_up.shape != (2 * down.shape[1], down.shape[0]) or gate_up.num_experts != down.num_experts:
        raise ShapeMismatch(
            f"{gate_up.num_experts} experts of {gate_up.shape} do not go with {down.num_experts} of "
            f"{down.shape}"
        )
    if tokens == 0:
        return residual.clone()
    groups = group_by_expert(launcher, experts, num_experts=gate_up.num_experts)
    inner = expert_linear(launcher, x, gate_up, groups, sources=groups.tokens, targets=None)
    inner = cuda_elementwise.swiglu(launcher, inner)
    made = expert_linear(launcher, inner, down, groups, sources=None, targets=groups.order)
    out = torch.empty_like(residual)
    launcher.launch(
        combining_kernel(type_name(x, "x")),
        Geometry(grid=(ceil_div(tokens * hidden // 8, 256), 1, 1), threads=256),
        [made, shares, residual, out, np.int64(tokens), np.int32(hidden), np.int32(chosen)],
    )
    return out


def choosing_kernel(kind: str, num_experts: int) -> Kernel:
    """For logits of type `f16` or `bf16`."""
    per_lane = 1
    while 32 * per_lane < num_experts:
        per_lane *= 2
    return Kernel(source="choose_experts", name=f"choose_experts<{kind}, {per_lane}>")


def expert_kernel(kind: str, form: WeightFormat | None, tile: int) -> Kernel:
    """For activations of type `f16` or `bf16`, weights of a format or of 16 bits, and tiles of a size.

    Raises:
        InvalidCheckpoint: there is no kernel for the format.
    """
    codes, group = ("Plain", 0) if form is None else (code_name(form), form.group_size or 0)
    return Kernel(source="expert_gemm", name=f"expert_gemm<{kind}, {codes}<{kind}>, {group}, {tile}>")


def combining_kernel(kind: str) -> Kernel:
    """For activations of type `f16` or `bf16`."""
    return Kernel(source="combine_experts", name=f"combine_experts<{kind}>")


def _check_counts(num_experts: int, num_chosen: int) -> None:
    if not takes(num_experts, num_chosen):
        raise ShapeMismatch(
            f"{num_chosen} of {num_experts} experts cannot be chosen; kernels take up to {MOST_CHOSEN} of "
            f"up to {MOST_EXPERTS}"
        )


def _check_weights(weights: PackedExperts, x: Tensor) -> None:
    if weights.dtype not in (None, x.dtype):
        raise ShapeMismatch(f"x is of type {x.dtype}, but the experts' weights of {weights.dtype}")
    padded = [ceil_div(size, _TILE) * _TILE for size in weights.shape]
    words = padded[0] * padded[1] * weights.bits // 32
    check(weights.words, "weights.words", shape=(None, words), dtype=torch.int32, device=x.device)
    if weights.form is None:
        return
    if weights.scales is None:
        raise InvalidCheckpoint(f"experts in {weights.form.name} have no scales")
    group = weights.form.group_size
    groups = () if group is None else (ceil_div(padded[1], group),)
    per_scale = (weights.num_experts, padded[0], *groups)
    check(weights.scales, "weights.scales", shape=per_scale, dtype=torch.float32, device=x.device)
    if weights.zeros is not None:
        check(weights.zeros, "weights.zeros", shape=per_scale, dtype=torch.uint8, device=x.device)
