"""Codes of 1 to 8 bits in a dense stream of bytes, and back.

Code k of a row holds bits k * bits to (k + 1) * bits - 1 of the row's stream, least significant first; bit
i of the stream is bit i % 8 of byte i // 8. Each row starts at a byte; what is left of its last byte is
zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely.

    Args:
        codes: (rows, count) uint8, each below 2**bits.
        bits: 1 to 8.

    Returns:
        (rows, ceil(count * bits / 8)) uint8.

    Raises:
        InvalidCheckpoint: a code does not fit in `bits`.
    """
    rows, count = codes.shape
    if codes.numel() and int(codes.max()) >> bits:
        raise InvalidCheckpoint(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes.clone()
    per_word, word_bytes = _word(bits)
    words = torch.zeros((rows, -(-count // per_word)), dtype=torch.int64)
    for index in range(per_word):
        column = codes[:, index::per_word]
        words[:, : column.shape[1]] |= column.long() << (bits * index)
    stream = torch.stack(
        [(words >> (8 * index) & 0xFF).to(torch.uint8) for index in range(word_bytes)], dim=-1
    )
    return stream.view(rows, -1)[:, : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`, exactly.

    Args:
        packed: (rows, ceil(count * bits / 8)) uint8.
        bits: 1 to 8.
        count: codes of a row.

    Returns:
        (rows, count) uint8.

    Raises:
        InvalidCheckpoint: rows have another length, or bits behind the last code are not zero.
    """
    rows, num_bytes = packed.shape
    if num_bytes != packed_bytes(count, bits):
        raise InvalidCheckpoint(
            f"a row of {count} codes of {bits} bits takes {packed_bytes(count, bits)} bytes, not {num_bytes}"
        )
    used_bits = count * bits % 8
    if used_bits and bool((packed[:, -1] >> used_bits).any()):
        raise InvalidCheckpoint("the bits behind a row's last code are not zero")
    if bits == 8:
        return packed.clone()
    per_word, word_bytes = _word(bits)
    num_words = -(-count // per_word)
    words = torch.zeros((rows, num_words), dtype=torch.int64)
    for index in range(word_bytes):
        column = packed[:, index::word_bytes]
        words[:, : column.shape[1]] |= column.long() << (8 * index)
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> (bits * i) & mask).to(torch.uint8) for i in range(per_word)], dim=-1)
    return codes.view(rows, -1)[:, :count].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and those bytes: at most 8 and 7, so a word fits in 64 bits."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
