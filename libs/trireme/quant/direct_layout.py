"""A layout of fp6_e3m2 that one shift and one mask bring to where float16 has its bits.

Two elements share a register, 16 bits apart. Sign and top exponent bit of 16 elements fill one word, the
other four bits of 8 elements another; in both, a register's bits lie a fixed shift from bits 15, 12 and 11 to
8. The half that results is the code's value times 2**-12, which the scale makes good.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from trireme.quant.fragment_order import LANES, from_lanes, to_lanes

SIGN_BITS: Final = (15, 14, 13, 9, 8, 7, 3, 2)
TOP_EXPONENT_BITS: Final = (12, 11, 10, 6, 5, 4, 0, 1)
"""Bits of the first word, by 4 * (block % 2) + register. One shift serves both, except for the last register:
the two bits that are left for it do not lie 3 apart."""
NIBBLE_BITS: Final = (8, 12, 4, 0)
"""Lowest bit of the other four, by register."""


def pack_direct(codes: Tensor) -> Tensor:
    """Lay a matrix of fp6_e3m2 codes out.

    Args:
        codes: (M, K) uint8 below 64.

    Returns:
        (words,) int32, the bits of unsigned words: first all slices' signs and top exponent bits, two words
        a lane, then all slices' other bits, four words a lane.
    """
    owned = to_lanes(codes).long().view(-1, LANES, 2, 16)  # (slices, lanes, pairs of blocks, elements)
    sign_at, exponent_at, nibble_at = _positions()
    top = ((owned >> 5) << sign_at | (owned >> 4 & 1) << exponent_at).sum(-1)
    nibbles = ((owned & 0xF) << nibble_at).view(-1, LANES, 4, 8).sum(-1)
    return torch.cat([part.transpose(1, 2).reshape(-1) for part in (top, nibbles)]).to(torch.int32)


def unpack_direct(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_direct`, exactly: (M, K) uint8 of `shape`."""
    unsigned = words.long() & 0xFFFFFFFF
    slices = len(words) // (6 * LANES)
    top, nibbles = unsigned[: 2 * slices * LANES], unsigned[2 * slices * LANES :]
    sign_at, exponent_at, nibble_at = _positions()
    top = top.view(slices, 2, LANES).transpose(1, 2)[..., None]
    nibbles = nibbles.view(slices, 4, LANES).transpose(1, 2).reshape(slices, LANES, 2, 2, 1)
    low = (nibbles >> nibble_at.view(2, 8) & 0xF).reshape(slices, LANES, 2, 16)
    owned = (top >> sign_at & 1) << 5 | (top >> exponent_at & 1) << 4 | low
    return from_lanes(owned.reshape(slices, LANES, 32).to(torch.uint8), shape)


def _positions() -> tuple[Tensor, Tensor, Tensor]:
    """The lowest bits of sign, top exponent bit and nibble of the 16 elements of two blocks."""
    element = torch.arange(16)
    # An element is a_v of its block: v = 2 * register + pair; fragment registers count row halves first.
    register, pair = element % 8 // 2, element % 2
    both = element // 8 * 4 + register
    half = 16 * pair
    return (
        torch.tensor(SIGN_BITS)[both] + half,
        torch.tensor(TOP_EXPONENT_BITS)[both] + half,
        torch.tensor(NIBBLE_BITS)[register] + half,
    )
