"""Linear layers on x86 CPUs with weights of 4 to 16 bits, computed by the kernels of `csrc/cpu`.

Weights are exact. Activations become fixed point of 16 bits, in steps that 64 inputs of a row share; products
are summed as integers, and the sums of the blocks of 64 inputs in float32. With bfloat16 weights all of it is
float32. A result depends on its own row alone: not on the other rows, their number, the threads or the
instruction set.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidConfiguration
from trireme.kernels.cpu_library import CpuLibrary, Level, NativeCall, NativeFormat, NativeWeight, cpu_library
from trireme.kernels.low_bit_layout import (
    BLOCK,
    TILE,
    bfloat16_words,
    group_values,
    int4_words,
    int8_words,
    minifloat_tables,
    minifloat_words,
)
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import QuantizedWeight

_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Of activations, as in linear.h."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """One matrix of M output and K input channels, in the order in which the kernels read it."""

    form: WeightFormat | None
    """None: bfloat16 weights."""
    shape: tuple[int, int]
    """(M, K), without padding."""
    words: Tensor
    """(bytes,) uint8."""
    scales: Tensor
    """float32: (M padded to 16,), or (tiles, groups, 16)."""
    zeros: Tensor | None = None
    """uint8 of the shape of `scales`; only in formats that have zero points."""
    input_order: Tensor | None = None
    """(K,) int32: the input of each column of codes; None: they are in order."""
    native: NativeWeight = field(repr=False)
    """All this as the library sees it; valid as long as the tensors are."""

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        parts = (self.words, self.scales, self.zeros, self.input_order)
        return sum(part.nbytes for part in parts if part is not None)


def takes(form: WeightFormat | None, dtype: torch.dtype) -> bool:
    """Whether `linear` runs here with weights of `form` (None: bfloat16) and activations of `dtype`.

    It does for all formats and float32 or bfloat16 activations, where the library is built and the CPU has
    AVX2.
    """
    return dtype in _TYPES and cpu_library() is not None


def pack(weight: QuantizedWeight) -> PackedLinear:
    """Bring a quantized matrix into the kernels' order.

    Raises:
        InvalidConfiguration: there are no kernels here (`takes`).
    """
    _library()
    form, codes = weight.form, weight.codes
    scales, zeros = weight.scales, weight.zeros
    powers, parts, unit = [0] * 16, [0] * 16, 1.0
    if form.minifloat is not None:
        words = minifloat_words(codes, form.bits)
        powers, parts, unit = minifloat_tables(form.minifloat)
        native_format = NativeFormat.FLOAT6 if form.bits == 6 else NativeFormat.FLOAT5
    else:
        words = int8_words(codes) if form.bits == 8 else int4_words(codes)
        native_format = NativeFormat.INT8 if form.bits == 8 else NativeFormat.INT4
    if form.group_size is None:
        scales = torch.nn.functional.pad(scales, (0, -len(scales) % TILE))
    else:
        groups = -(-(codes.shape[1] + -codes.shape[1] % BLOCK) // form.group_size)
        scales = group_values(scales, groups)
        zeros = None if zeros is None else group_values(zeros, groups)
    return _packed(
        form,
        (codes.shape[0], codes.shape[1]),
        words,
        scales,
        zeros,
        NativeWeight(
            format=native_format,
            group=form.group_size or 0,
            power=(ctypes.c_int8 * 16)(*powers),
            mantissa=(ctypes.c_uint8 * 16)(*parts),
            unit=unit,
        ),
        None if weight.input_order is None else weight.input_order.int(),
    )


def pack_bf16(weight: Tensor) -> PackedLinear:
    """Bring a matrix (M, K) into the kernels' order, rounded to bfloat16 if it is of another type.

    Raises:
        InvalidConfiguration: there are no kernels here (`takes`).
    """
    _library()
    shape = (weight.shape[0], weight.shape[1])
    native = NativeWeight(format=NativeFormat.BFLOAT16, unit=1.0)
    return _packed(None, shape, bfloat16_words(weight.bfloat16()), torch.empty(0), None, native)


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x times the packed weight transposed, plus bias, plus residual, on PyTorch's number of threads.

    An infinity or a NaN in a row makes all its outputs NaN; with bfloat16 weights it goes where float32 takes
    it.

    Args:
        x: (rows, inputs) float32 or bfloat16 on the CPU; rows may be strided.
        packed: the weight.
        bias: (outputs,) of x's type.
        residual: (rows, outputs) of x's type.

    Returns:
        (rows, outputs) of x's type, contiguous.

    Raises:
        InvalidConfiguration: a shape, type or device differs from the above, or there are no kernels here.
    """
    return linear_at(x, packed, bias, residual, level=_library().level, threads=torch.get_num_threads())


def linear_at(
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    level: Level,
    threads: int,
) -> Tensor:
    """`linear` with the kernels of one instruction set, on up to `threads` threads: the same result."""
    outputs, inputs = packed.shape
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype not in _TYPES or not x.is_cpu:
        raise InvalidConfiguration(
            f"x must be (rows, {inputs}) float32 or bfloat16 on the CPU, not {_described(x)}"
        )
    rows = x.shape[0]
    if x.stride(1) != 1 and inputs > 1:
        x = x.contiguous()
    if bias is not None:
        bias = _checked("bias", bias, (outputs,), x)
    if residual is not None:
        residual = _checked("residual", residual, (rows, outputs), x)
    out = torch.empty((rows, outputs), dtype=x.dtype)
    call = NativeCall(
        ctypes.addressof(packed.native),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        x.stride(0),
        _TYPES[x.dtype],
    )
    outcome = _library().linear(ctypes.addressof(call), level, threads)
    if outcome == 1:
        raise MemoryError(f"no memory for {rows} rows of {inputs} activations")
    if outcome:
        raise InvalidConfiguration(f"this CPU has no {Level(level).name}")
    return out


def _packed(
    form: WeightFormat | None,
    shape: tuple[int, int],
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    native: NativeWeight,
    input_order: Tensor | None = None,
) -> PackedLinear:
    native.words = words.data_ptr()
    native.scales = scales.data_ptr()
    native.zeros = None if zeros is None else zeros.data_ptr()
    native.input_order = None if input_order is None else input_order.data_ptr()
    native.outputs, native.inputs = shape
    return PackedLinear(
        form=form,
        shape=shape,
        words=words,
        scales=scales,
        zeros=zeros,
        input_order=input_order,
        native=native,
    )


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise InvalidConfiguration(f"{name} must be {shape} {x.dtype} on the CPU, not {_described(tensor)}")
    return tensor.contiguous()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _library() -> CpuLibrary:
    library = cpu_library()
    if library is None:
        raise InvalidConfiguration(
            "this CPU has no kernels, or they are not built: run python -m trireme.kernels.cpu_build"
        )
    return library
