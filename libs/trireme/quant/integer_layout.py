"""A layout of 4- and 8-bit integers that one mask brings to the low bits of both halves of a register.

A lane owns 8 elements of a block, 2 in each of 4 registers: one word of 4-bit codes, or two of 8-bit codes.
Of 4 bits, register r has bits 4 * r and up, its second element 16 bits above. Of 8 bits, register r has bytes
2 * r and 2 * r + 1 of the two words, lowest first. Or-ed into a float16 of 1024, code u reads as 1024 + u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trireme.quant.fragment_order import LANES, from_lanes, to_lanes


def pack_integers(codes: Tensor, bits: int, *, fill: int) -> Tensor:
    """Lay a matrix out.

    Args:
        codes: (M, K) uint8 below 2**bits.
        bits: 4 or 8.
        fill: the code of padding, one of value 0.

    Returns:
        (words,) int32, the bits of unsigned words: `bits` words a lane for each slice of 64 rows and 16
        columns, the lanes' first words first.
    """
    per_word = 32 // bits
    owned = (
        to_lanes(codes, fill=fill).long().view(-1, LANES, bits, per_word)
    )  # (slices, lanes, words, elements)
    return (owned << _shifts(bits)).sum(-1).transpose(1, 2).reshape(-1).to(torch.int32)


def unpack_integers(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_integers`, exactly: (M, K) uint8 of `shape`."""
    unsigned = (words.long() & 0xFFFFFFFF).view(-1, bits, LANES).transpose(1, 2)
    owned = unsigned[..., None] >> _shifts(bits) & ((1 << bits) - 1)
    return from_lanes(owned.reshape(-1, LANES, 32).to(torch.uint8), shape)


def _shifts(bits: int) -> Tensor:
    """Of the 32 / bits elements of a word, a_0 first."""
    element = torch.arange(32 // bits)
    if bits == 4:
        return 4 * (element // 2) + 16 * (element % 2)
    return 8 * element
