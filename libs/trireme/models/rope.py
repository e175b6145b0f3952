"""Rotary position tables, computed once per model.

A token's angles depend on its position alone, never on how long its sequence is now: a cached
key stays right as its sequence grows, and may be shared by sequences of different lengths.
Dynamic scaling therefore uses at position p the frequencies for a sequence of p + 1 tokens,
which is what a token-by-token decode does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trireme.models.config import RopeConfig, RopeKind


class RopeTable:
    """Cosines and signed sines for all positions below `num_positions`, as `ops.rotary` takes them."""

    def __init__(
        self,
        rope: RopeConfig,
        *,
        head_dim: int,
        max_positions: int,
        num_positions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        angles = _angles(rope, head_dim, max_positions, num_positions)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), -1)[:, None, :].to(device, dtype)  # (positions, 1, head_dim)
        self._sin = torch.cat((-sin, sin), -1)[:, None, :].to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine (tokens, 1, head_dim) for positions (tokens,) int64."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def _angles(rope: RopeConfig, head_dim: int, max_positions: int, num_positions: int) -> Tensor:
    """(num_positions, head_dim / 2) float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    positions = torch.arange(num_positions, dtype=torch.float32)
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeKind.LINEAR:
        frequencies = frequencies / rope.factor
    elif rope.kind is RopeKind.LLAMA3:
        frequencies = _llama3(rope, frequencies)
    angles = positions[:, None] * frequencies
    if rope.kind is RopeKind.DYNAMIC and num_positions > max_positions:
        lengths = torch.arange(max_positions + 1, num_positions + 1, dtype=torch.float64)
        stretch = rope.factor * lengths / max_positions - (rope.factor - 1)
        thetas = (rope.theta * stretch ** (head_dim / (head_dim - 2))).float()
        angles[max_positions:] = positions[max_positions:, None] / thetas[:, None] ** exponents
    return angles


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Keep short waves, stretch long ones by `factor`, and blend in between.

    Source: Llama 3.1 model card and reference code.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(turns < rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, frequencies, stretched)
