"""The order in which the CPU kernels read a weight: tiles of 16 outputs, in a tile blocks of 64 inputs.

Derived from the canonical codes, never stored. `csrc/cpu/decode.h` draws it from the reader's side.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from trireme.quant.minifloat import Minifloat

TILE: Final = 16
"""Outputs."""
BLOCK: Final = 64
"""Inputs."""


def tiled(matrix: Tensor) -> Tensor:
    """(M, K) to (tiles, 16, K padded to whole blocks), padded with 0."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % TILE))
    return padded.view(-1, TILE, padded.shape[1])


def int8_words(codes: Tensor) -> Tensor:
    """(M, K) uint8 codes of 8 bits to bytes: by pair of inputs, 16 outputs, the pair; two's complement."""
    return _split(tiled(codes) ^ 0x80, 2).transpose(1, 2).reshape(-1)


def int4_words(codes: Tensor) -> Tensor:
    """(M, K) uint8 codes of 4 bits to bytes: by 8 inputs, 16 outputs, element of the pair; 4 pairs each."""
    pairs = _split(tiled(codes), 2, 2, 2)  # tile, output, unit, byte, nibble, element
    both = pairs[..., 0, :] | pairs[..., 1, :] << 4  # tile, output, unit, byte, element
    return both.permute(0, 2, 1, 4, 3).reshape(-1)


def minifloat_words(codes: Tensor, bits: int) -> Tensor:
    """(M, K) uint8 codes of 5 or 6 bits to bytes: by 32 or 16 inputs, their upper 4 bits, then the rest."""
    low_bits = bits - 4
    elements = 8 // low_bits
    split = _split(tiled(codes), elements, 2, 2)  # tile, output, unit, element, half, pair
    split = split.permute(0, 2, 3, 1, 5, 4)  # tile, unit, element, output, pair, half
    upper, lower = split >> low_bits, split & ((1 << low_bits) - 1)
    nibbles = upper[:, :, 0::2] | upper[:, :, 1::2] << 4
    rest = torch.zeros_like(lower[:, :, :1])
    for element in range(elements):
        rest |= lower[:, :, element : element + 1] << (low_bits * element)
    return torch.cat((nibbles, rest), dim=2).reshape(-1)


def bfloat16_words(weight: Tensor) -> Tensor:
    """(M, K) bfloat16 to bytes: by pair of inputs, 16 outputs, the pair."""
    return _split(tiled(weight), 2).transpose(1, 2).reshape(-1).view(torch.uint8)


def group_values(values: Tensor, groups: int) -> Tensor:
    """(M, K / group) to (tiles, groups, 16): scales or zero points as tiles read them, padded with 0."""
    rows, present = values.shape
    padded = torch.nn.functional.pad(values, (0, groups - present, 0, -rows % TILE))
    return padded.view(-1, TILE, groups).transpose(1, 2).contiguous()


def minifloat_tables(form: Minifloat) -> tuple[list[int], list[int], float]:
    """How a code's upper 4 bits and its others make an integer.

    Returns:
        Sixteen powers of two with the code's sign, sixteen parts of the mantissa, and a unit: the value is
        power * (part | other bits) * unit. Exponent 0 lacks the implicit bit and has exponent 1's power.
    """
    low_bits = form.bits - 4
    powers, parts = [], []
    for upper in range(16):
        code = upper << low_bits
        field, mantissa = divmod(code & (form.sign_bit - 1), 1 << form.mantissa_bits)
        power = 1 << max(field - 1, 0)
        powers.append(-power if code & form.sign_bit else power)
        parts.append(mantissa + (1 << form.mantissa_bits if field else 0))
    smallest = form.magnitudes[1]
    return powers, parts, smallest


def _split(tiles: Tensor, *sizes: int) -> Tensor:
    """(tiles, 16, K) to (tiles, 16, units, *sizes)."""
    return tiles.view(*tiles.shape[:2], -1, *sizes)
