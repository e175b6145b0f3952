"""A weight matrix to codes and scales, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.formats import WeightFormat
from trireme.quant.minifloat_codes import decode, encode

_SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny
"""Scales below the normal range of float32 would lose their own bits."""
_BLOCK_ELEMENTS: Final = 1 << 22
"""Worked on at a time in float64, whatever the size of the matrix."""
_ACCEPTED: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """One matrix of M output and K input channels; canonical: one code per element."""

    form: WeightFormat
    codes: Tensor
    """(M, K) uint8. Integers are stored as u: value = (u - zero) * scale; symmetric: zero = 2**(bits - 1)."""
    scales: Tensor
    """float32, finite: (M,) for a scale per row, (M, K / group_size) for groups. Positive, or in formats with
    signed scales not zero."""
    zeros: Tensor | None = None
    """(M, K / group_size) uint8, below 2**bits; only in formats that have zero points."""
    input_order: Tensor | None = None
    """(K,) int64: the input channel that each column of codes belongs to; None: they are in order."""

    @property
    def stored_bytes(self) -> int:
        """Of packed codes, scales and packed zero points, as they lie in files."""
        num_codes = self.codes.numel() + (0 if self.zeros is None else self.zeros.numel())
        order_bytes = 0 if self.input_order is None else self.input_order.nbytes
        return num_codes * self.form.bits // 8 + self.scales.nbytes + order_bytes


def quantize(weight: Tensor, form: WeightFormat, *, name: str = "weight") -> QuantizedWeight:
    """Round a matrix to a format: to nearest even, saturating, scaled to the largest magnitude that it has.

    A scale is `max |w|` over the largest magnitude of the format (28 in fp6_e3m2, 127 in int8_ch), or with
    zero points the range, zero included, over 15. In int4 without zero points its sign is such that the
    weight of largest magnitude gets -8, and its size the least that leaves no weight more than half a step
    outside of -8 to 7. It is computed in float64 and rounded to float32, and codes are chosen for the rounded
    scale. A row or group of zeros has scale 1.

    Args:
        weight: (M, K) float32, bfloat16 or float16, on the CPU.
        form: the format.
        name: what errors call the matrix.

    Raises:
        InvalidCheckpoint: a weight is NaN or infinite (names the index), the matrix is not of two dimensions
            or is empty, its type is another, or groups do not fill its rows.

    Source: Xia et al., Quant-LLM, USENIX ATC 2024 (a scale per output channel).
    """
    check_shape(tuple(weight.shape), form, name=name)
    if weight.dtype not in _ACCEPTED:
        raise InvalidCheckpoint(
            f"{name} is of type {weight.dtype}; only float32, bfloat16 and float16 weights can be quantized"
        )
    _check_finite(weight, name)
    out_channels, in_channels = weight.shape
    groups = form.groups(in_channels)
    codes = torch.empty((out_channels, in_channels), dtype=torch.uint8)
    scales = torch.empty((out_channels, groups), dtype=torch.float32)
    zeros = torch.empty((out_channels, groups), dtype=torch.uint8) if form.has_zeros else None
    for rows in row_blocks(out_channels, in_channels):
        grouped = weight[rows].double().contiguous().view(-1, groups, in_channels // groups)
        scale = _scales(grouped, form)
        scaled = grouped / scale.double()[..., None]
        zero = _zeros(scaled) if form.has_zeros else None
        codes[rows] = _encode(scaled, zero, form).view(-1, in_channels)
        scales[rows] = scale
        if zeros is not None and zero is not None:
            zeros[rows] = zero.to(torch.uint8)
    return QuantizedWeight(
        form=form, codes=codes, scales=scales[:, 0] if form.group_size is None else scales, zeros=zeros
    )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that codes and scales stand for: (M, K) of `dtype`, computed in float64 and rounded.

    float64 is exact; narrower types than float32 are rounded by way of float32.
    """
    out = torch.empty(weight.codes.shape, dtype=dtype)
    for rows in row_blocks(*out.shape):
        out[rows] = dequantize_rows(weight, rows)
    return out


def dequantize_rows(weight: QuantizedWeight, rows: slice) -> Tensor:
    """Some rows of `dequantize`: (rows, K) float64, exact."""
    form, codes = weight.form, weight.codes[rows]
    in_channels = codes.shape[1]
    groups = form.groups(in_channels)
    grouped = codes.view(-1, groups, in_channels // groups)
    if form.minifloat is not None:
        values = decode(form.minifloat, grouped)
    else:
        zero: Tensor | int = 1 << (form.bits - 1)
        if weight.zeros is not None:
            zero = weight.zeros[rows].double()[..., None]
        values = grouped.double() - zero
    scale = weight.scales[rows].double().view(-1, groups, 1)
    found = (values * scale).view(-1, in_channels)
    if weight.input_order is None:
        return found
    return torch.empty_like(found).index_copy_(1, weight.input_order, found)


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put matrices of one format, width and order of inputs below each other; codes, scales and zero points
    are theirs.

    Raises:
        InvalidCheckpoint: formats, widths or orders differ.
    """
    first = weights[0]
    for weight in weights[1:]:
        if weight.form != first.form or weight.codes.shape[1] != first.codes.shape[1]:
            raise InvalidCheckpoint(
                f"{first.form.name} of {first.codes.shape[1]} input channels and {weight.form.name} of "
                f"{weight.codes.shape[1]} cannot be one matrix"
            )
    if len(weights) == 1:
        return first
    if not have_one_order(weights):
        raise InvalidCheckpoint("matrices whose input channels are ordered differently cannot be one")
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    return QuantizedWeight(
        form=first.form,
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=torch.cat(zeros) if zeros else None,
        input_order=first.input_order,
    )


def have_one_order(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether columns of codes belong to the same input channels in all."""
    first = weights[0].input_order
    if first is None:
        return all(weight.input_order is None for weight in weights)
    return all(
        weight.input_order is not None and torch.equal(weight.input_order, first) for weight in weights
    )


def select_rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Some output channels in some order; `rows`: (outputs,) int64."""
    return QuantizedWeight(
        form=weight.form,
        codes=weight.codes.index_select(0, rows),
        scales=weight.scales.index_select(0, rows),
        zeros=None if weight.zeros is None else weight.zeros.index_select(0, rows),
        input_order=weight.input_order,
    )


def row_blocks(out_channels: int, in_channels: int) -> Iterator[slice]:
    """Slices that cover the rows, each of a bounded number of elements."""
    step = max(1, _BLOCK_ELEMENTS // in_channels)
    for first in range(0, out_channels, step):
        yield slice(first, min(first + step, out_channels))


def check_shape(shape: tuple[int, ...], form: WeightFormat, *, name: str) -> None:
    """Refuse what cannot be a matrix of the format.

    Raises:
        InvalidCheckpoint: `shape` has not two dimensions, is empty, or groups do not fill its rows.
    """
    if len(shape) != 2 or 0 in shape:
        raise InvalidCheckpoint(f"{name} has shape {shape}; only non-empty matrices can be quantized")
    if form.group_size is not None and shape[1] % form.group_size:
        raise InvalidCheckpoint(
            f"{name} has {shape[1]} input channels, no multiple of the group size {form.group_size} of "
            f"{form.name}; take a smaller group, or a format with a scale per row"
        )


def _check_finite(weight: Tensor, name: str) -> None:
    for rows in row_blocks(*weight.shape):
        is_bad = ~torch.isfinite(weight[rows])
        if is_bad.any():
            row, column = (int(index) for index in is_bad.nonzero()[0])
            value = float(weight[rows][row, column])
            raise InvalidCheckpoint(
                f"{name}[{rows.start + row}, {column}] is {value}; weights must be finite to be quantized"
            )


def _scales(grouped: Tensor, form: WeightFormat) -> Tensor:
    """(rows, groups, size) float64 to (rows, groups) float32."""
    low, high = grouped.amin(-1).clamp(max=0.0).neg(), grouped.amax(-1).clamp(min=0.0)
    dominant, other = torch.maximum(low, high), torch.minimum(low, high)
    half = 1 << (form.bits - 1)
    if form.has_zeros:
        wanted = (low + high) / (2 * half - 1)
    elif form.has_signed_scales:
        wanted = torch.maximum(dominant / half, other / (half - 0.5))
    else:
        wanted = dominant / (form.minifloat.max_value if form.minifloat else half - 1)
    wanted = wanted.clamp(min=_SMALLEST_SCALE)
    scale = wanted.float()
    if form.group_size is not None:
        # Rounded down, so that the outermost weights never miss the outermost codes by a hair.
        scale = torch.where(scale > wanted, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    if form.has_signed_scales:
        scale = torch.where(high > low, -scale, scale)
    return torch.where(dominant == 0, torch.ones_like(scale), scale)


def _zeros(scaled: Tensor) -> Tensor:
    """The code of value 0 in each group: (rows, groups) float64 integers."""
    # Half up, not to even: so the lowest value gets code 0 and the highest the last, ties too.
    return torch.floor(scaled.amin(-1).clamp(max=0.0).neg() + 0.5)


def _encode(scaled: Tensor, zero: Tensor | None, form: WeightFormat) -> Tensor:
    if form.minifloat is not None:
        return encode(form.minifloat, scaled)
    last = (1 << form.bits) - 1
    if zero is not None:
        return (scaled + zero[..., None]).round().clamp(0, last).to(torch.uint8)
    half = (last + 1) // 2
    return (scaled.round() + half).clamp(0, last).to(torch.uint8)
