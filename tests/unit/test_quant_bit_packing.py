"""Dense packing: against bits written as text, there and back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.errors import InvalidCheckpoint
from trireme.quant.bit_packing import pack, packed_bytes, unpack


def packed_as_text(codes: list[int], bits: int) -> list[int]:
    """The row as one binary number, whose digits are read from the right, eight at a time."""
    digits = "".join(f"{code:0{bits}b}" for code in reversed(codes))
    digits = digits.zfill(8 * packed_bytes(len(codes), bits))
    return list(reversed([int(digits[at : at + 8], 2) for at in range(0, len(digits), 8)]))


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 4), count=st.integers(1, 70))
def test_codes_come_back_from_the_bits_that_the_layout_says(
    data: st.DataObject, bits: int, rows: int, count: int
) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == [packed_as_text(row, bits) for row in codes]
    assert unpack(packed, bits, count).tolist() == codes


def test_four_codes_of_six_bits_fill_three_bytes() -> None:
    codes = torch.tensor([[0b000001, 0b100000, 0b111111, 0b010101]], dtype=torch.uint8)
    assert pack(codes, 6).tolist() == [[0b00000001, 0b11111000, 0b01010111]]


def test_a_code_of_too_many_bits_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="64 does not fit in 6 bits"):
        pack(torch.tensor([[1, 64]], dtype=torch.uint8), 6)


@pytest.mark.parametrize("num_bytes", [0, 2, 4])
def test_a_row_of_another_length_is_refused(num_bytes: int) -> None:
    with pytest.raises(InvalidCheckpoint, match="takes 3 bytes"):
        unpack(torch.zeros((2, num_bytes), dtype=torch.uint8), 6, 4)


def test_bits_behind_the_last_code_are_refused() -> None:
    packed = pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 6)  # 18 bits of 24
    packed[0, -1] |= 0b0100
    with pytest.raises(InvalidCheckpoint, match="not zero"):
        unpack(packed, 6, 3)
