"""The layout of the FP6-LLM kernels: codes of b bits cut into segments of 1, 2 and 4 bits.

A code is cut from its top into the widths that sum to b. The segments of a width fill 32-bit words of their
own: a word holds 32 / width of one lane's elements, so placed that the top `width` bits of its four bytes
belong to the next four elements. All words of the narrowest width come first.

Source: Xia et al., Quant-LLM, USENIX ATC 2024 (pre-packing); the word order of their packer in
usyd-fsalab/fp6_llm.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from trireme.quant.fragment_order import LANES, from_lanes, to_lanes

_BYTE_OF: Final = (2, 0, 3, 1)
"""Of every four elements, counted from the word's most significant byte."""


def segment_widths(bits: int) -> tuple[int, ...]:
    """Widths of the segments of a code, from its top: 2 and 4 for six bits."""
    return tuple(width for width in (1, 2, 4) if bits & width)


def pack_interleaved(codes: Tensor, bits: int) -> Tensor:
    """Lay a matrix out.

    Args:
        codes: (M, K) uint8 below 2**bits.
        bits: 1 to 7.

    Returns:
        (words,) int32, the bits of the layout's unsigned words.
    """
    owned = to_lanes(codes).long()  # (slices, lanes, 32)
    parts, below = [], bits
    for width in segment_widths(bits):
        below -= width
        segments = (owned >> below & ((1 << width) - 1)).view(-1, LANES, width, 32 // width)
        words = (segments << _shifts(width)).sum(-1)  # (slices, lanes, words of a lane)
        parts.append(words.transpose(1, 2).reshape(-1))
    return torch.cat(parts).to(torch.int32)


def unpack_interleaved(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_interleaved`, exactly: (M, K) uint8 of `shape`."""
    unsigned = words.long() & 0xFFFFFFFF
    slices = len(words) // (bits * LANES)
    owned = torch.zeros((slices, LANES, 32), dtype=torch.int64)
    start = 0
    for width in segment_widths(bits):
        part = unsigned[start : start + slices * width * LANES].view(slices, width, LANES).transpose(1, 2)
        segments = part[..., None] >> _shifts(width) & ((1 << width) - 1)
        owned = owned << width | segments.reshape(slices, LANES, 32)
        start += slices * width * LANES
    return from_lanes(owned.to(torch.uint8), shape)


def _shifts(width: int) -> Tensor:
    """Where each of the 32 / width segments of a word has its lowest bit."""
    element = torch.arange(32 // width)
    return 32 - 8 * torch.tensor(_BYTE_OF)[element % 4] - width * (element // 4 + 1)
