"""Device layouts: each bit against the closed form, decoding as a kernel does it, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.errors import InvalidCheckpoint
from trireme.quant.device_layouts import DIRECT, INTERLEAVED, pack_for_device, unpack_from_device
from trireme.quant.direct_layout import pack_direct
from trireme.quant.formats import FORMATS, weight_format
from trireme.quant.integer_layout import pack_integers
from trireme.quant.interleaved_layout import pack_interleaved
from trireme.quant.minifloat import FP6_E3M2
from trireme.quant.minifloat_codes import decode
from trireme.quant.quantization import QuantizedWeight, dequantize


def random_weight(rows: int, columns: int, name: str, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    form = weight_format(name)
    per_scale = (rows, form.groups(columns)) if form.group_size else (rows,)
    scales = torch.rand(per_scale, generator=generator) + 0.1

    def below(limit: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=generator, dtype=torch.uint8)

    return QuantizedWeight(
        form=form,
        codes=below(2**form.bits, (rows, columns)),
        scales=scales,
        zeros=below(2**form.bits, per_scale) if form.has_zeros else None,
    )


def segments(code: int, bits: int) -> Iterator[tuple[int, int]]:
    """(width, value), from the top of the code's digits."""
    digits = f"{code:0{bits}b}"
    for width in (1, 2, 4):
        if bits & width:
            yield width, int(digits[:width], 2)
            digits = digits[width:]


def interleaved_one_by_one(codes: list[list[int]], bits: int) -> list[int]:
    """Element by element, as the kernels' page defines it."""
    rows, columns = len(codes), len(codes[0])
    words = {width: [0] * (rows * columns * width // 32) for width in (1, 2, 4) if bits & width}
    for m in range(rows):
        for k in range(columns):
            i, r, j = m // 64, m % 64, k // 16
            block, h, l = r // 16, r % 16 // 8, r % 8  # noqa: E741  the definition's names
            g, t, p = k % 16 // 8, k % 8 // 2, k % 2
            lane, v, s = 4 * l + t, 4 * g + 2 * h + p, i * (columns // 16) + j
            q = 8 * block + v
            for width, value in segments(codes[m][k], bits):
                per = 32 // width
                word, x = divmod(q, per)
                turn, y = divmod(x, 4)
                shift = 32 - 8 * (2, 0, 3, 1)[y] - width * (turn + 1)
                words[width][(s * width + word) * 32 + lane] |= value << shift
    return [word for width in sorted(words) for word in words[width]]


@pytest.mark.parametrize("name", ["fp6_e3m2", "fp5_e2m2"])
def test_interleaved_words_are_those_of_the_closed_form(name: str) -> None:
    weight = random_weight(128, 64, name)
    packed = pack_interleaved(weight.codes, weight.form.bits)
    wanted = interleaved_one_by_one(weight.codes.tolist(), weight.form.bits)
    assert (packed.long() & 0xFFFFFFFF).tolist() == wanted


def test_direct_words_decode_by_shift_and_mask_to_halves() -> None:
    """Every register of every lane, decoded as a kernel does, in numpy."""
    codes = random_weight(128, 192, "fp6_e3m2").codes
    words = pack_direct(codes, FP6_E3M2).numpy().view(np.uint32)
    slices = 2 * 12
    tops = words[: slices * 64].reshape(slices, 2, 32)
    nibbles = words[slices * 64 :].reshape(slices, 4, 32)
    values = decode(FP6_E3M2, codes).numpy()
    lane = np.arange(32)
    for s in range(slices):
        for block in range(4):
            for register in range(4):
                w2, w4, which = tops[s, block // 2], nibbles[s, block], 4 * (block % 2) + register
                if which == 7:
                    t = (w2 << 13) & 0x80008000 | (w2 << 11) & 0x10001000
                else:
                    t = (w2 << (0, 1, 2, 6, 7, 8, 12)[which]) & 0x90009000
                x = (w4, w4 >> 4, w4 << 4, w4 << 8)[register]
                halves = (x & 0x0F000F00 | t).astype(np.uint32).view(np.float16).reshape(32, 2)
                row = s // 12 * 64 + block * 16 + register % 2 * 8 + lane // 4
                column = s % 12 * 16 + register // 2 * 8 + lane % 4 * 2
                for pair in range(2):
                    wanted = values[row, column + pair]
                    found = halves[:, pair].astype(np.float64) * 4096
                    assert (found == wanted).all()
                    assert (np.signbit(found) == np.signbit(wanted)).all()


@pytest.mark.parametrize("name, sign, exponent, nibble", [("fp6_e2m3", 15, 11, 7), ("fp5_e2m2", 15, None, 8)])
def test_direct_words_of_two_exponent_bits_decode_likewise(
    name: str, sign: int, exponent: int | None, nibble: int
) -> None:
    """Every register of every lane: upper bits, then the nibble, brought to where float16 has them."""
    weight = random_weight(64, 128, name)
    form = weight.form.minifloat
    assert form is not None
    words = pack_direct(weight.codes, form).numpy().view(np.uint32)
    slices, heads = 8, weight.form.bits - 4
    upper = words[: slices * 32 * heads].reshape(slices, heads, 32)
    lower = words[slices * 32 * heads :].reshape(slices, 4, 32)
    values = decode(form, weight.codes).numpy()
    lane = np.arange(32)
    for s in range(slices):
        for block in range(4):
            for register in range(4):
                if exponent is None:
                    top = upper[s, 0] << np.uint32(4 * block + register) & 0x80008000
                else:
                    shift = (0, 1, 2, 3, 8, 9, 10, 11)[4 * (block % 2) + register]
                    top = upper[s, block // 2] << np.uint32(shift) & 0x88008800
                at = (8, 12, 4, 0)[register]
                moved = lower[s, block].astype(np.int64) << 8 >> at << nibble >> 8
                mask = 0xF << nibble | 0xF << nibble + 16
                halves = (moved & mask | top).astype(np.uint32).view(np.float16).reshape(32, 2)
                row = block * 16 + register % 2 * 8 + lane // 4
                column = s * 16 + register // 2 * 8 + lane % 4 * 2
                for pair in range(2):
                    found, wanted = halves[:, pair].astype(np.float64) * 2**14, values[row, column + pair]
                    assert (found == wanted).all()
                    assert (np.signbit(found) == np.signbit(wanted)).all()


@pytest.mark.parametrize(
    "layout, name",
    [(layout, name) for layout in (INTERLEAVED, DIRECT) for name in ("fp6_e3m2", "fp6_e2m3", "fp5_e2m2")],
)
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 150), columns=st.integers(1, 150), seed=st.integers(0, 999))
def test_codes_and_scales_come_back_from_any_shape(
    layout: str, name: str, rows: int, columns: int, seed: int
) -> None:
    weight = random_weight(rows, columns, name, seed)
    packed = pack_for_device(weight, layout)
    tiles = -(-rows // 64) * -(-columns // 64)
    assert packed.words.nbytes == tiles * 64 * 64 * weight.form.bits // 8
    back = unpack_from_device(packed)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_words_decode_by_mask_to_halves(bits: int) -> None:
    """Every register of every lane, or-ed into the float16 1024 as a kernel does, in numpy."""
    codes = random_weight(128, 64, "int8_ch" if bits == 8 else "int4_g64").codes
    words = pack_integers(codes, bits, fill=0).numpy().view(np.uint32).reshape(8, 4, bits // 4, 32)
    wanted = codes.numpy().astype(np.float64)
    lane = np.arange(32)
    for s in range(8):
        for block in range(4):
            for register in range(4):
                if bits == 4:
                    x = words[s, block, 0] >> 4 * register & 0x000F000F
                else:
                    two = words[s, block, register // 2] >> 16 * (register % 2)
                    x = two & 0xFF | (two & 0xFF00) << 8
                halves = (x | 0x64006400).astype(np.uint32).view(np.float16).reshape(32, 2)
                row = s // 4 * 64 + block * 16 + register % 2 * 8 + lane // 4
                column = s % 4 * 16 + register // 2 * 8 + lane % 4 * 2
                for pair in range(2):
                    assert (halves[:, pair].astype(np.float64) - 1024 == wanted[row, column + pair]).all()


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "int4_g32_zeros", "int8_ch"])
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 150), groups=st.integers(1, 5), seed=st.integers(0, 999))
def test_integers_come_back_with_scales_and_zero_points(name: str, rows: int, groups: int, seed: int) -> None:
    weight = random_weight(rows, groups * (weight_format(name).group_size or 7), name, seed)
    back = unpack_from_device(pack_for_device(weight, DIRECT))
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert torch.equal(dequantize(back), dequantize(weight))


@pytest.mark.parametrize("name", ["fp6_e3m2", "int8_ch", "int4_g32", "int4_g32_zeros"])
def test_padding_has_value_zero(name: str) -> None:
    packed = pack_for_device(random_weight(1, 32, name), DIRECT)
    tile = dataclasses.replace(packed, shape=(64, 64))
    values = dequantize(unpack_from_device(tile))
    assert (values[1:] == 0).all() and (values[:, 32:] == 0).all() and (values[0, :32] != 0).any()


@pytest.mark.parametrize("layout", [INTERLEAVED, DIRECT])
def test_padding_is_code_zero_and_scale_one(layout: str) -> None:
    weight = random_weight(1, 1, "fp6_e3m2")
    packed = pack_for_device(weight, layout)
    assert (packed.scales[1:] == 1).all() and len(packed.scales) == 64
    assert len(packed.words.nonzero()) <= 2  # the two words that hold the one code


@pytest.mark.parametrize(
    "layout, name",
    [
        ("dense_v1", "fp6_e3m2"),
        ("direct_v2", "fp6_e3m2"),
        (INTERLEAVED, "int8_ch"),
        (INTERLEAVED, "int4_g64"),
    ],
)
def test_layouts_refuse_what_they_do_not_take(layout: str, name: str) -> None:
    assert name in FORMATS
    with pytest.raises(InvalidCheckpoint, match=layout):
        pack_for_device(random_weight(64, 64, name), layout)


@pytest.mark.parametrize("layout", [INTERLEAVED, DIRECT])
def test_another_number_of_words_is_refused(layout: str) -> None:
    packed = pack_for_device(random_weight(64, 64, "fp6_e3m2"), layout)
    cut = dataclasses.replace(packed, shape=(64, 65))
    with pytest.raises(InvalidCheckpoint, match="1536 words"):
        unpack_from_device(cut)
