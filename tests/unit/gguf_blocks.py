"""Blocks of llama.cpp's K types, weight by weight, as ggml's structures lay them out: no code of `gguf`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping

from gguf import GGMLQuantizationType as Form

BLOCK = 256
SCALE_PLACES: Mapping[Form, tuple[int, ...]] = {
    Form.Q2_K: (80, 82),
    Form.Q3_K: (108,),
    Form.Q4_K: (0, 2),
    Form.Q5_K: (0, 2),
    Form.Q6_K: (208,),
}
"""Where a block has its float16 numbers: the scale of scales and, in some, that of the least weights."""


def _half(block: bytes, place: int) -> float:
    return float(struct.unpack_from("<e", block, place)[0])


def _q2_k(block: bytes) -> Iterator[float]:
    scales, codes = block[:16], block[16:80]
    scale, least = _half(block, 80), _half(block, 82)
    for place in range(BLOCK):
        part, within = divmod(place, 128)
        plane, column = divmod(within, 32)
        code = codes[32 * part + column] >> 2 * plane & 3
        both = scales[place // 16]
        yield scale * (both & 15) * code - least * (both >> 4)


def _q3_k(block: bytes) -> Iterator[float]:
    high, codes, packed, scale = block[:32], block[32:96], block[96:108], _half(block, 108)
    for place in range(BLOCK):
        part, within = divmod(place, 128)
        plane, column = divmod(within, 32)
        code = codes[32 * part + column] >> 2 * plane & 3
        if not high[column] >> (4 * part + plane) & 1:
            code -= 4
        group = place // 16
        low = packed[group % 8] >> 4 * (group // 8) & 15
        both = low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4
        yield scale * (both - 32) * code


def _six_bits(packed: bytes, group: int) -> tuple[int, int]:
    """Scale and least of a group of 32 weights, of the twelve bytes that Q4_K and Q5_K share."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    return (
        packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
        packed[group + 4] >> 4 | packed[group] >> 6 << 4,
    )


def _q4_k(block: bytes) -> Iterator[float]:
    codes = block[16:]
    for place in range(BLOCK):
        group, column = divmod(place, 32)
        code = codes[32 * (group // 2) + column] >> 4 * (group % 2) & 15
        scale, least = _six_bits(block[4:16], group)
        yield _half(block, 0) * scale * code - _half(block, 2) * least


def _q5_k(block: bytes) -> Iterator[float]:
    high, codes = block[16:48], block[48:]
    for place in range(BLOCK):
        group, column = divmod(place, 32)
        code = codes[32 * (group // 2) + column] >> 4 * (group % 2) & 15
        code |= (high[column] >> group & 1) << 4
        scale, least = _six_bits(block[4:16], group)
        yield _half(block, 0) * scale * code - _half(block, 2) * least


DECODED: Mapping[Form, Callable[[bytes], Iterator[float]]] = {
    Form.Q2_K: _q2_k,
    Form.Q3_K: _q3_k,
    Form.Q4_K: _q4_k,
    Form.Q5_K: _q5_k,
}
