"""Products with tile registers: their kernels run on a model of the registers, on any CPU with AVX2."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_cpu_linear import activations, in_blocks, matrix
from trireme.errors import InvalidConfiguration
from trireme.kernels import cpu_build
from trireme.kernels.cpu_library import Level, NativeCall, cpu_library
from trireme.kernels.low_bit_cpu import PackedLinear, linear_at, pack, pack_bf16
from trireme.quant.formats import FORMATS
from trireme.quant.quantization import quantize

MODEL = Path(__file__).parents[1] / "tile_model"
FEWEST_ROWS = 8
ROWS_AT_ONCE = 96


@dataclass(frozen=True, slots=True)
class Model:
    linear: Callable[[Any, int], int]
    products: Callable[[], int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    library = tmp_path_factory.mktemp("tiles") / "model.so"
    units = [
        cpu_build.SOURCES / "multiply.cpp",
        cpu_build.SOURCES / "thread_pool.cpp",
        MODEL / "model_kernels.cpp",
    ]
    subprocess.run(
        [
            *(
                cpu_build.compiler(),
                "-O1",
                "-std=c++17",
                "-fPIC",
                "-shared",
                "-ffp-contract=off",
                "-pthread",
                "-w",
            ),
            *("-mavx2", "-mfma", "-I", str(cpu_build.SOURCES), "-I", str(MODEL)),
            *(*map(str, units), "-o", str(library)),
        ],
        check=True,
    )
    native = ctypes.CDLL(str(library))
    native.model_linear.argtypes = (ctypes.c_void_p, ctypes.c_int)
    native.model_products.restype = ctypes.c_int64
    yield Model(linear=native.model_linear, products=native.model_products)


def with_tiles(
    model: Model,
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    threads: int = 1,
) -> Tensor:
    """As `linear_at`."""
    out = torch.full((len(x), packed.shape[0]), 7.0).to(x.dtype)
    call = NativeCall(
        ctypes.addressof(packed.native),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        len(x),
        x.stride(0),
        0 if x.dtype == torch.float32 else 1,
    )
    assert model.linear(ctypes.addressof(call), threads) == 0
    return out


def with_lanes(
    x: Tensor, packed: PackedLinear, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    return linear_at(x, packed, bias, residual, level=Level.AVX2, threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_4_to_8_bits_give_the_bits_that_lanes_give(
    model: Model, name: str, dtype: torch.dtype
) -> None:
    for outputs, inputs in ((1, 32), (17, 96), (33, 160), (20, 1056)):
        if inputs % (FORMATS[name].group_size or 1):
            continue
        _, packed = matrix(name, outputs, inputs)
        for rows in (1, 7, 8, 9, 16, 17, 33, 81, 96, 97):
            x = activations(rows, inputs).to(dtype)
            bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
            found = with_tiles(model, x, packed, bias, residual)
            assert torch.equal(found, with_lanes(x, packed, bias, residual)), (outputs, inputs, rows)


def products_of(name: str, outputs: int, inputs: int, rows: int) -> int:
    """Tile products of a call: two for each group of rows, tile of outputs and block (or span of 32)."""
    if rows < FEWEST_ROWS:
        return 0
    whole, rest = divmod(rows, ROWS_AT_ONCE)
    groups = whole * ROWS_AT_ONCE // 16 + -(-rest // 16)
    blocks = -(-inputs // 64) * (2 if FORMATS[name].group_size == 32 else 1)
    return groups * -(-outputs // 16) * blocks * (4 if name == "fp6_e3m2" else 2)


@pytest.mark.parametrize("name", FORMATS)
def test_few_rows_take_lanes_and_more_take_tiles(model: Model, name: str) -> None:
    _, packed = matrix(name, 33, 384)
    model.products()
    for rows in (1, 7, 8, 16, 17, 97):
        with_tiles(model, activations(rows, 384), packed)
        assert model.products() == products_of(name, 33, 384, rows), rows


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_codes_and_activations_do_not_overflow(model: Model, name: str) -> None:
    signs = torch.where(torch.rand(16, 128) < 0.5, -1.0, 1.0)
    packed = pack(quantize(signs, FORMATS[name]))  # all codes are the largest or its negative
    for largest in (2.0 - 2.0**-20, -2.0 + 2.0**-20):
        x = signs * largest  # row i meets its signs in output i
        assert torch.equal(with_tiles(model, x, packed), with_lanes(x, packed))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    outputs=st.integers(1, 40),
    groups=st.integers(1, 5),
    odd=st.integers(0, 31),
    rows=st.integers(FEWEST_ROWS, 40),
    threads=st.integers(1, 3),
    exponent=st.integers(-40, 30),
)
def test_any_shape_and_magnitude(
    model: Model, name: str, outputs: int, groups: int, odd: int, rows: int, threads: int, exponent: int
) -> None:
    form = FORMATS[name]
    inputs = groups * form.group_size if form.group_size else 32 * groups + odd
    _, packed = matrix(name, outputs, inputs)
    x = activations(rows, inputs) * 2.0**exponent
    assert torch.equal(with_tiles(model, x, packed, threads=threads), with_lanes(x, packed))


def leading_bits(x: Tensor) -> Tensor:
    """float32 with all but its upper 16 bits cleared."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


def fused(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """a * b + total, rounded to float32 once."""
    return (a.double() * b.double() + total.double()).float()


def documented(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, outputs) float32, step by step as docs/cpu_kernels.md says it for bfloat16 weights and tiles."""
    parts, rest = [], x
    for _ in range(3):
        parts.append(leading_bits(rest))
        rest = rest - parts[-1]
    assert rest.eq(0).all()
    weights = in_blocks(weight, 32).permute(1, 2, 0)  # block, input, output
    total = torch.zeros(len(x), len(weight))
    for block, by_input in enumerate(weights):
        for part in reversed(parts):
            inputs = in_blocks(part, 32)[:, block]
            chains = [torch.zeros_like(total), torch.zeros_like(total)]
            for i in range(32):
                chains[i % 2] = fused(inputs[:, i, None], by_input[i], chains[i % 2])
            total = total + (chains[0] + chains[1])
    return total


BFLOAT16_SHAPES = ((1, 1), (33, 65), (20, 544))
BFLOAT16_ROWS = (1, 3, 16, 17, 33, 97)


def test_bfloat16_weights_give_the_documented_bits(model: Model) -> None:
    for outputs, inputs in BFLOAT16_SHAPES:
        weight = torch.randn(outputs, inputs).bfloat16()
        packed = pack_bf16(weight)
        for rows in BFLOAT16_ROWS:
            x = activations(rows, inputs)
            assert torch.equal(with_tiles(model, x, packed), documented(x, weight.float())), (outputs, rows)
            whole = with_tiles(model, leading_bits(x), packed)
            narrow = with_tiles(model, leading_bits(x).bfloat16(), packed)
            assert torch.equal(narrow, whole.bfloat16()), (outputs, rows)


def test_bfloat16_weights_are_near_float64(model: Model) -> None:
    for outputs, inputs in BFLOAT16_SHAPES:
        weight = torch.randn(outputs, inputs)
        packed = pack_bf16(weight)
        values = weight.bfloat16().double()
        for dtype in (torch.float32, torch.bfloat16):
            for rows in BFLOAT16_ROWS:
                x = activations(rows, inputs).to(dtype)
                bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
                exact = x.double() @ values.T + bias.double() + residual.double()
                summed = x.double().abs() @ values.abs().T + bias.double().abs() + residual.double().abs()
                allowed = 2.0**-20 * summed + torch.finfo(dtype).eps / 2 * exact.abs()
                found = with_tiles(model, x, packed, bias, residual)
                assert (found.double() - exact).abs().le(allowed).all()


def test_bfloat16_weights_take_tiles_for_any_number_of_rows(model: Model) -> None:
    packed = pack_bf16(torch.randn(33, 384))
    model.products()
    for rows, groups in ((1, 1), (16, 1), (17, 2), (97, 7)):
        for x, parts in ((activations(rows, 384), 3), (activations(rows, 384).bfloat16(), 1)):
            with_tiles(model, x, packed)
            assert model.products() == groups * 3 * (384 // 32) * parts


def test_a_row_gets_the_same_bits_whoever_is_beside_it(model: Model) -> None:
    x = activations(205, 384)
    residual = torch.randn(205, 20)
    weights = {name: matrix(name, 20, 384)[1] for name in ("int8_ch", "int4_g32_zeros", "fp6_e3m2")}
    for name, packed in (*weights.items(), ("bfloat16", pack_bf16(torch.randn(20, 384)))):
        alone = torch.cat(
            [with_tiles(model, x[i : i + 1], packed, None, residual[i : i + 1]) for i in range(205)]
        )
        for rows in (2, 7, 8, 16, 17, 95, 97, 205):
            order = torch.randperm(205)[:rows]
            together = with_tiles(model, x[order], packed, None, residual[order].contiguous(), threads=3)
            assert torch.equal(together, alone[order]), (name, rows)


def test_what_is_not_finite_reaches_all_outputs_of_its_row_and_no_other(model: Model) -> None:
    x = activations(20, 384)
    weights = {name: matrix(name, 33, 384)[1] for name in FORMATS}
    for name, packed in (*weights.items(), ("bfloat16", pack_bf16(torch.randn(33, 384)))):
        before = with_tiles(model, x, packed)
        others = [row for row in range(20) if row != 17]
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[17, 200] = value
            after = with_tiles(model, spoilt, packed)
            assert not torch.isfinite(after[17]).any(), name
            assert torch.equal(after[others], before[others]), name
            assert not torch.isfinite(with_tiles(model, spoilt.bfloat16(), packed)[17]).any(), name


def test_infinities_pass_bfloat16_weights_with_their_sign_and_all_nans_stay(model: Model) -> None:
    packed = pack_bf16(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
    assert with_tiles(model, torch.tensor([[torch.inf, 1.0]]), packed).tolist() == [[torch.inf, -torch.inf]]
    largest = torch.tensor([[torch.finfo(torch.float32).max, 0.0]])
    assert with_tiles(model, largest, packed)[0, 0] == largest[0, 0]
    for bits in (0x7F800001, 0x7FC00000):  # one of them has its mark in the bits that a bfloat16 lacks
        nan = torch.tensor([[bits, 0]], dtype=torch.int32).view(torch.float32)
        assert with_tiles(model, nan, packed).isnan().all()


def test_zeros_and_tiny_activations(model: Model) -> None:
    packed = pack_bf16(torch.randn(20, 160))
    assert with_tiles(model, torch.zeros(9, 160), packed).eq(0).all()
    assert with_tiles(model, torch.full((9, 160), 1e-40), packed).abs().max() <= 1e-33
    x = activations(9, 160) * 2.0**-100  # whose last parts are below 2^-126
    exact = x.double() @ dequantized(packed, 160).T
    assert (with_tiles(model, x, packed).double() - exact).abs().max() <= 2.0**-110


def dequantized(packed: PackedLinear, inputs: int) -> Tensor:
    """The weights of one that `pack_bf16` made."""
    eye = torch.eye(inputs)
    return with_lanes(eye, packed).T.double()


def test_a_level_that_the_cpu_lacks_is_refused() -> None:
    library = cpu_library()
    assert library is not None
    if library.level == Level.AMX:
        pytest.skip("this CPU has AMX")
    with pytest.raises(InvalidConfiguration, match="AMX"):
        linear_at(torch.randn(16, 64), pack_bf16(torch.randn(4, 64)), None, None, level=Level.AMX, threads=1)


HAS_TILES = """#include "linear.h"
extern "C" __attribute__((visibility("default"))) int has_tiles() {
    return trireme::kAmxKernels.multiply != nullptr;
}
"""


def test_a_compiler_without_amx_builds_the_others_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    for source in cpu_build.source_files():
        (sources / source.name).touch()
    for name in ("amx.cpp", "linear.h"):
        (sources / name).write_text((cpu_build.SOURCES / name).read_text(encoding="utf-8"), encoding="utf-8")
    (sources / "library.cpp").write_text(HAS_TILES, encoding="utf-8")
    old = tmp_path / "old-compiler"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {cpu_build.compiler()} "$@"\n',
        encoding="utf-8",
    )
    old.chmod(0o755)
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    monkeypatch.setattr(cpu_build, "DIRECTORY", tmp_path)
    monkeypatch.setenv("CXX", str(old))
    built = ctypes.CDLL(str(cpu_build.build()))
    assert built.has_tiles() == 0
    assert "no AMX" in capfd.readouterr().err
