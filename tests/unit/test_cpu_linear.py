"""Linear layers on the CPU's kernels: the documented arithmetic bit for bit, near float64, row by row."""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trireme.errors import InvalidConfiguration
from trireme.kernels import cpu_build
from trireme.kernels.cpu_library import Level, cpu_library
from trireme.kernels.low_bit_cpu import PackedLinear, linear, linear_at, pack, pack_bf16, takes
from trireme.quant.formats import FORMATS, WeightFormat
from trireme.quant.quantization import QuantizedWeight, dequantize, quantize

try:
    cpu_build.build()
except cpu_build.BuildFailed as failure:
    pytest.skip(f"the CPU kernels cannot be built here: {failure}", allow_module_level=True)
if cpu_library() is None:
    pytest.skip("this CPU has no AVX2", allow_module_level=True)

LEVELS = [level for level in Level if level is not Level.NONE]
BLOCK = 64


def needs(level: Level) -> None:
    library = cpu_library()
    assert library is not None
    if library.level < level:
        pytest.skip(f"this CPU has no {level.name}")


@functools.cache
def matrix(name: str, outputs: int, inputs: int) -> tuple[QuantizedWeight, PackedLinear]:
    generator = torch.Generator().manual_seed(outputs * 10007 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[0, 0] = 9.0  # an outlier
    quantized = quantize(weight, FORMATS[name])
    return quantized, pack(quantized)


def activations(rows: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-6, 6, (rows, inputs), generator=generator).float())
    return torch.randn(rows, inputs, generator=generator) * spread


def in_blocks(x: Tensor, size: int) -> Tensor:
    """(rows, inputs) to (rows, blocks, size), padded with 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    return padded.view(len(x), padded.shape[1] // size, size)


def fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """The documented rounding: codes (rows, blocks, 64) and steps (rows, blocks, 1), in float64."""
    blocks = in_blocks(x.double(), BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.double() - 1  # of the leading bit
    steps = torch.exp2(torch.where(largest > 0, exponent, -200.0).clamp(min=-111) - 14)
    return (blocks / steps).round().clamp(max=32767), steps


def documented(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """(rows, outputs) float32, step by step as docs/cpu_kernels.md says it."""
    form = weight.form
    outputs = len(weight.codes)
    codes, steps = fixed_point(x)
    unit = 1.0 if form.minifloat is None else form.minifloat.magnitudes[1]
    ones = torch.ones_like(weight.scales)
    values = dequantize(
        QuantizedWeight(form=form, codes=weight.codes, scales=ones, zeros=weight.zeros), torch.float64
    )
    integers = in_blocks(values / unit, BLOCK)  # (outputs, blocks, 64)
    group = form.group_size
    part = min(group or BLOCK, BLOCK)
    total = torch.zeros(len(x), outputs, dtype=torch.float32)
    for block in range(codes.shape[1]):
        for first in range(0, BLOCK, part):
            span = slice(first, first + part)
            sums = codes[:, block, span] @ integers[:, block, span].T  # exact: below 2**53
            factor = steps[:, block].float().expand(-1, outputs)
            if group:
                column = (block * BLOCK + first) // group
                if column >= weight.scales.shape[1]:
                    continue  # padding
                factor = factor * weight.scales[:, column]
            total = (sums.float().double() * factor.double() + total.double()).float()
    return total if group else total * torch.tensor(unit) * weight.scales


SHAPES = ((1, 32), (17, 96), (33, 160), (64, 384), (100, 1056))


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("name", FORMATS)
def test_the_arithmetic_is_the_documented_one_bit_for_bit(name: str, level: Level) -> None:
    needs(level)
    for outputs, inputs in SHAPES:
        if inputs % (FORMATS[name].group_size or 1):
            continue
        weight, packed = matrix(name, outputs, inputs)
        for rows in (1, 5, 14):
            x = activations(rows, inputs)
            computed = linear_at(x, packed, None, None, level=level, threads=2)
            assert torch.equal(computed, documented(x, weight)), (outputs, inputs, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_near_those_of_float64(name: str, dtype: torch.dtype) -> None:
    for outputs, inputs in (*SHAPES, (48, 512)):
        if inputs % (FORMATS[name].group_size or 1):
            continue
        weight, packed = matrix(name, outputs, inputs)
        values = dequantize(weight, torch.float64)
        for rows in (1, 3, 40):
            x = activations(rows, inputs).to(dtype)
            bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
            exact = x.double() @ values.T + bias.double() + residual.double()
            largest = in_blocks(x.double(), BLOCK).abs().amax(-1)
            moved = 2.0**-15 * largest @ in_blocks(values, BLOCK).abs().sum(-1).T  # by the fixed point
            summed = x.double().abs() @ values.abs().T + bias.double().abs() + residual.double().abs()
            rounding = torch.finfo(dtype).eps / 2 * exact.abs()
            allowed = moved + 2.0**-21 * summed + rounding
            assert (linear(x, packed, bias, residual).double() - exact).abs().le(allowed).all()


def test_bfloat16_weights_are_near_float64() -> None:
    for outputs, inputs in ((1, 1), (33, 65), (100, 1056)):
        weight = torch.randn(outputs, inputs)
        packed = pack_bf16(weight)
        values = weight.bfloat16().double()
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 3, 40):
                x = activations(rows, inputs).to(dtype)
                bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
                exact = x.double() @ values.T + bias.double() + residual.double()
                summed = x.double().abs() @ values.abs().T + bias.double().abs() + residual.double().abs()
                allowed = 2.0**-18 * summed + torch.finfo(dtype).eps / 2 * exact.abs()
                assert (linear(x, packed, bias, residual).double() - exact).abs().le(allowed).all()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 5),
    odd=st.integers(0, 31),
    rows=st.integers(0, 30),
    threads=st.integers(1, 5),
    exponent=st.integers(-40, 30),
)
def test_any_shape_and_magnitude(
    name: str, outputs: int, groups: int, odd: int, rows: int, threads: int, exponent: int
) -> None:
    form = FORMATS[name]
    inputs = groups * form.group_size if form.group_size else 32 * groups + odd
    weight, packed = matrix(name, outputs, inputs)
    x = activations(rows, inputs) * 2.0**exponent
    computed = linear_at(x, packed, None, None, level=Level.AVX2, threads=threads)
    assert torch.equal(computed, documented(x, weight))


def everywhere() -> list[tuple[str, PackedLinear]]:
    packed = [(name, matrix(name, 100, 384)[1]) for name in FORMATS]
    return [*packed, ("bfloat16", pack_bf16(torch.randn(100, 384)))]


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_row_gets_the_same_bits_whoever_is_beside_it(level: Level) -> None:
    needs(level)
    x = activations(205, 384)
    residual = torch.randn(205, 100)
    for name, packed in everywhere():
        alone = torch.cat(
            [
                linear_at(x[i : i + 1], packed, None, residual[i : i + 1], level=level, threads=1)
                for i in range(205)
            ]
        )
        for rows in (2, 3, 4, 5, 6, 7, 11, 12, 13, 95, 96, 97, 205):
            order = torch.randperm(205)[:rows]
            together = linear_at(x[order], packed, None, residual[order], level=level, threads=3)
            assert torch.equal(together, alone[order]), (name, rows)


def test_threads_and_instruction_sets_do_not_change_a_bit() -> None:
    library = cpu_library()
    assert library is not None
    weight = torch.randn(700, 640)
    packed = [pack(quantize(weight, form)) for form in FORMATS.values()]
    for rows in (1, 9, 130):
        x = activations(rows, 640)
        for one in (*packed, pack_bf16(weight)):
            first = linear_at(x, one, None, None, level=Level.AVX2, threads=1)
            here = [level for level in LEVELS if level <= library.level]
            if one.form is None and Level.AMX in here:  # whose tiles round bfloat16 weights' sums otherwise
                here.remove(Level.AMX)
            for level in here:
                for threads in (1, 2, 3, 8):
                    assert torch.equal(first, linear_at(x, one, None, None, level=level, threads=threads))


def test_what_is_not_finite_reaches_all_outputs_of_its_row_and_no_other() -> None:
    x = activations(8, 384)
    for name, packed in everywhere():
        before = linear(x, packed, None)
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[3, 200] = value
            after = linear(spoilt, packed, None)
            others = [row for row in range(8) if row != 3]
            assert not torch.isfinite(after[3]).any(), name
            assert torch.equal(after[others], before[others]), name
            assert not torch.isfinite(linear(spoilt[3:4], packed, None)).any(), name
            assert not torch.isfinite(linear(spoilt.bfloat16(), packed, None)[3]).any(), name


def test_infinities_pass_bfloat16_weights_with_their_sign() -> None:
    packed = pack_bf16(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
    assert linear(torch.tensor([[torch.inf, 1.0]]), packed, None).tolist() == [[torch.inf, -torch.inf]]


def test_bfloat16_activations_close_to_the_largest_are_not_rounded() -> None:
    x = (torch.randint(128, 256, (4, 640)) * torch.exp2(torch.randint(-6, 1, (4, 640)))).bfloat16()
    codes, steps = fixed_point(x)
    assert torch.equal((codes * steps).view(4, -1), x.double())
    weight, packed = matrix("int8_ch", 33, 640)
    assert torch.equal(linear(x.float(), packed, None), documented(x.float(), weight))


def test_zeros_and_tiny_activations() -> None:
    _, packed = matrix("fp6_e2m3", 33, 160)
    assert linear(torch.zeros(3, 160), packed, None).eq(0).all()
    tiny = linear(torch.full((1, 160), 1e-40), packed, None)
    assert tiny.abs().max() <= 1e-33


def test_rows_may_be_strided_and_none_may_be_there() -> None:
    for _, packed in everywhere():
        wide = activations(7, 3 * 384)
        part = wide[:, 384:768]
        assert torch.equal(linear(part, packed, None), linear(part.contiguous(), packed, None))
        turned = activations(384, 7).T
        assert torch.equal(linear(turned, packed, None), linear(turned.contiguous(), packed, None))
        assert linear(wide[:0, :384], packed, None).shape == (0, 100)


def test_python_threads_may_call_at_once() -> None:
    weight = torch.randn(512, 640)
    packed = pack(quantize(weight, FORMATS["int4_g32"]))
    inputs = [activations(rows, 640, seed=rows) for rows in range(1, 17)]
    expected = [linear_at(x, packed, None, None, level=Level.AVX2, threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda x: linear_at(x, packed, None, None, level=Level.AVX2, threads=3), inputs)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


FORK = """
import os, torch
from trireme.kernels.cpu_library import Level
from trireme.kernels.low_bit_cpu import linear_at, pack
from trireme.quant.formats import FORMATS
from trireme.quant.quantization import quantize

packed = pack(quantize(torch.randn(512, 640), FORMATS["int8_ch"]))
x = torch.randn(4, 640)
before = linear_at(x, packed, None, None, level=Level.AVX2, threads=3)
child = os.fork()
after = linear_at(x, packed, None, None, level=Level.AVX2, threads=3)
same = bytes(before.numpy()) == bytes(after.numpy())
if child == 0:
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


def test_what_does_not_fit_is_refused() -> None:
    _, packed = matrix("int8_ch", 33, 160)
    x = torch.randn(2, 160)
    for wrong in (x[:, :159], x.double(), x[0], x.half()):
        with pytest.raises(InvalidConfiguration, match=r"\(rows, 160\)"):
            linear(wrong, packed, None)
    with pytest.raises(InvalidConfiguration, match="bias"):
        linear(x, packed, torch.randn(32))
    with pytest.raises(InvalidConfiguration, match="bias"):
        linear(x, packed, torch.randn(33).bfloat16())
    with pytest.raises(InvalidConfiguration, match="residual"):
        linear(x, packed, None, torch.randn(1, 33))


def test_all_formats_are_taken_with_float32_and_bfloat16() -> None:
    forms: list[WeightFormat | None] = [None, *FORMATS.values()]
    assert all(takes(form, dtype) for form in forms for dtype in (torch.float32, torch.bfloat16))
    assert not any(takes(form, torch.float16) for form in forms)


def test_packed_bytes_are_those_of_the_format() -> None:
    for name, form in FORMATS.items():
        _, packed = matrix(name, 64, 384)
        groups = 384 // form.group_size if form.group_size else 1
        per_group = 5 if form.has_zeros else 4
        assert packed.nbytes == 64 * 384 * form.bits // 8 + 64 * groups * per_group
