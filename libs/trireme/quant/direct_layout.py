"""A layout of floats of 5 and 6 bits that a shift and a mask bring to where float16 has its bits.

Two elements share a register, 16 bits apart. A code's lowest four bits lie in one array of words, its others
in another; in both, a register's bits lie a fixed shift from their places in float16. That gives the code's
value times 2**-12 (3 exponent bits) or 2**-14 (2), which the scale makes good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.quant.fragment_order import LANES, from_lanes, to_lanes
from trireme.quant.minifloat import FP5_E2M2, FP6_E2M3, FP6_E3M2, Minifloat

NIBBLE_BITS: Final = (8, 12, 4, 0)
"""Lowest bit of a code's lowest four, by register."""


@dataclass(frozen=True, slots=True)
class TopBits:
    """Where the other bits of a code are."""

    blocks: int
    """Of 16 rows, whose elements share a word."""
    bits: tuple[tuple[int, ...], ...]
    """Of each of them, the sign first, its bit by 4 * (block % blocks) + register."""


_TOP_BITS: Final = {
    # One shift serves both bits, except for the last register: what is left for it does not lie 3 apart.
    FP6_E3M2: TopBits(2, ((15, 14, 13, 9, 8, 7, 3, 2), (12, 11, 10, 6, 5, 4, 0, 1))),
    FP6_E2M3: TopBits(2, ((15, 14, 13, 12, 7, 6, 5, 4), (11, 10, 9, 8, 3, 2, 1, 0))),
    FP5_E2M2: TopBits(4, (tuple(range(15, -1, -1)),)),
}


def takes(form: Minifloat) -> bool:
    """Whether codes of a form can be laid out."""
    return form in _TOP_BITS


def pack_direct(codes: Tensor, form: Minifloat) -> Tensor:
    """Lay a matrix of codes out.

    Args:
        codes: (M, K) uint8.
        form: one that `takes` says yes to.

    Returns:
        (words,) int32, the bits of unsigned words: first all slices' upper bits, as many words a lane as a
        code has of them, then all slices' lower bits, four words a lane.
    """
    top = _TOP_BITS[form]
    owned = to_lanes(codes).long().view(-1, LANES, 4 // top.blocks, 8 * top.blocks)
    # (slices, lanes, words, elements)
    upper = sum(
        ((owned >> shift & 1) << at).sum(-1)
        for shift, at in zip(_shifts(form), _upper_places(top), strict=True)
    )
    assert isinstance(upper, Tensor)
    lower = ((owned & 0xF).view(-1, LANES, 4, 8) << _lower_places()).sum(-1)
    return torch.cat([part.transpose(1, 2).reshape(-1) for part in (upper, lower)]).to(torch.int32)


def unpack_direct(words: Tensor, form: Minifloat, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_direct`, exactly: (M, K) uint8 of `shape`."""
    top = _TOP_BITS[form]
    unsigned = words.long() & 0xFFFFFFFF
    upper_words = 4 // top.blocks
    slices = len(words) // ((upper_words + 4) * LANES)
    upper, lower = unsigned[: upper_words * slices * LANES], unsigned[upper_words * slices * LANES :]
    upper = upper.view(slices, upper_words, LANES).transpose(1, 2)[..., None]
    lower = lower.view(slices, 4, LANES).transpose(1, 2)[..., None]
    codes = (lower >> _lower_places() & 0xF).reshape(slices, LANES, upper_words, 8 * top.blocks)
    for shift, at in zip(_shifts(form), _upper_places(top), strict=True):
        codes = codes | (upper >> at & 1) << shift
    return from_lanes(codes.reshape(slices, LANES, 32).to(torch.uint8), shape)


def _shifts(form: Minifloat) -> range:
    """Of a code's upper bits, the sign first."""
    return range(form.bits - 1, 3, -1)


def _upper_places(top: TopBits) -> list[Tensor]:
    """Of each upper bit, where it lies in its word, for the elements of the blocks that share one."""
    element = torch.arange(8 * top.blocks)
    # An element is a_v of its block: v = 2 * register + pair; fragment registers count row halves first.
    return [torch.tensor(bits)[element // 2] + 16 * (element % 2) for bits in top.bits]


def _lower_places() -> Tensor:
    """Lowest bits of the nibbles of a block's 8 elements."""
    element = torch.arange(8)
    return torch.tensor(NIBBLE_BITS)[element // 2] + 16 * (element % 2)
