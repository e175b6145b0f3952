"""Rotary position tables, computed once per model.

A token's angles depend on its position alone, never on how long its sequence is now: a cached
key stays right as its sequence grows, and may be shared by sequences of different lengths.
Dynamic scaling therefore uses at position p the frequencies for a sequence of p + 1 tokens,
which is what a token-by-token decode does.

Longrope has two sets of frequencies, one for sequences within the original context and one for longer ones.
A model takes the second for all of its sequences if it is to serve positions beyond the original context.

Where only the first part of each head is rotated, `partial_rotary_order` puts queries and keys in such an
order that pairs lie half a head apart as everywhere; those that are not rotated have frequency 0.

Rotations add up: a key rotated for position p, turned by -n steps, is the key for position p - n.
So cached keys may move, unless the frequencies themselves depend on the position.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.kernels import ops
from trireme.models.config import RopeConfig, RopeKind


class KeyRotation:
    """Moves cached keys to other positions, whatever they were rotated for."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies`: (head_dim / 2) float32, radians per position."""
        self._frequencies = frequencies.double()

    def turn(self, keys: Tensor, steps: int | Tensor) -> Tensor:
        """The keys for positions that lie `steps` farther on; negative: that lie before.

        Values have no position and stay as they are.

        Args:
            keys: (..., tokens, kv_heads, head_dim), float32, bfloat16 or float16.
            steps: for all tokens, or (tokens,) int64.

        Returns:
            A new tensor of the shape and type of `keys`, computed in float32 and rounded once.
        """
        by = torch.as_tensor(steps, device=keys.device).double().reshape(-1, 1, 1)
        angles = by * self._frequencies.to(keys.device)  # (tokens or 1, 1, head_dim / 2)
        cos, sin = angles.cos().float(), angles.sin().float()
        turned = ops.rotary(keys.float(), torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        return turned.to(keys.dtype)


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
        rotary_dim: int | None = None,
    ) -> None:
        """`rotary_dim`: of each head, the first that are rotated, in `partial_rotary_order`; None: all."""
        rotary_dim = rotary_dim or head_dim
        frequencies = _frequencies(rope, rotary_dim, num_positions)
        stretches = rope.kind is RopeKind.DYNAMIC and num_positions > max_positions
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
        if stretches:
            angles[max_positions:] = _stretched(rope, rotary_dim, max_positions, num_positions)
        unrotated = (head_dim - rotary_dim) // 2
        self.key_rotation = None if stretches else KeyRotation(F.pad(frequencies, (0, unrotated)))
        """None: a key of one position is no rotation of another's."""
        cos = F.pad(angles.cos() * rope.amplitude, (0, unrotated), value=1.0)
        sin = F.pad(angles.sin() * rope.amplitude, (0, unrotated))
        self._cos = torch.cat((cos, cos), -1)[:, None, :].to(device, dtype)  # (positions, 1, head_dim)
        self._sin = torch.cat((-sin, sin), -1)[:, None, :].to(device, dtype)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines: (positions, 1, head_dim)."""
        return self._cos, self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine (tokens, 1, head_dim) for positions (tokens,) int64."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def partial_rotary_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Where each dimension of a head comes from, so that pairs rotary_dim / 2 apart lie head_dim / 2 apart.

    Dot products do not depend on the order: (head_dim,) int64.
    """
    rotated = torch.arange(rotary_dim).view(2, -1)
    others = torch.arange(rotary_dim, head_dim).view(2, -1)
    return torch.cat((rotated, others), 1).reshape(-1)


def _frequencies(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """Radians per position of each pair: (head_dim / 2) float32."""
    exponents = _exponents(head_dim)
    if rope.kind is RopeKind.LONGROPE:
        is_long = num_positions > rope.original_max_positions
        factors = torch.tensor(rope.long_factors if is_long else rope.short_factors)
        return 1.0 / (factors * rope.theta**exponents)
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    return _llama3(rope, frequencies) if rope.kind is RopeKind.LLAMA3 else frequencies


def _stretched(rope: RopeConfig, head_dim: int, max_positions: int, num_positions: int) -> Tensor:
    """Dynamic scaling's angles behind the trained context: (num_positions - max_positions, head_dim / 2)."""
    positions = torch.arange(max_positions, num_positions, dtype=torch.float32)
    lengths = torch.arange(max_positions + 1, num_positions + 1, dtype=torch.float64)
    stretch = rope.factor * lengths / max_positions - (rope.factor - 1)
    thetas = (rope.theta * stretch ** (head_dim / (head_dim - 2))).float()
    return positions[:, None] / thetas[:, None] ** _exponents(head_dim)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


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
