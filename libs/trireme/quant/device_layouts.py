"""Codes in the order that a device's kernels read them, by layout id. Derived, never the only copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.direct_layout import pack_direct, takes, unpack_direct
from trireme.quant.formats import WeightFormat
from trireme.quant.fragment_order import padded
from trireme.quant.integer_layout import pack_integers, unpack_integers
from trireme.quant.interleaved_layout import pack_interleaved, unpack_interleaved
from trireme.quant.quantization import QuantizedWeight

INTERLEAVED: Final = "interleaved_v1"
"""fp6 and fp5, in the order of the FP6-LLM kernels."""
DIRECT: Final = "direct_v1"
"""Decoded by shift and mask."""
LAYOUTS: Final = (INTERLEAVED, DIRECT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """One matrix of M output and K input channels in a device's layout."""

    layout: str
    form: WeightFormat
    shape: tuple[int, int]
    """(M, K) without padding."""
    words: Tensor
    """(words,) int32, of M and K padded to multiples of 64 with a code of value 0."""
    scales: Tensor
    """float32, 1 in the padding: (M padded,), or (M padded, ceil(K padded / group_size)) for groups."""
    zeros: Tensor | None = None
    """uint8 of the shape of `scales`, 0 in the padding; only in formats that have zero points."""


def pack_for_device(weight: QuantizedWeight, layout: str) -> PackedWeight:
    """Bring a matrix into a device's layout. Shard first, then pack: tiles cannot be cut.

    Raises:
        InvalidCheckpoint: the layout is unknown or does not take the weight's format, or its input channels
            are not in order.
    """
    form = weight.form
    _check_layout(layout, form)
    if weight.input_order is not None:
        raise InvalidCheckpoint(f"{layout} has no place for an order of input channels")
    rows, columns = weight.codes.shape
    if layout == INTERLEAVED:
        words = pack_interleaved(weight.codes, form.bits)
    elif form.minifloat is not None:
        words = pack_direct(weight.codes, form.minifloat)
    else:
        fill = 0 if form.has_zeros else 1 << (form.bits - 1)
        words = pack_integers(weight.codes, form.bits, fill=fill)
    per_scale = _scales_shape((padded(rows), padded(columns)), form)
    return PackedWeight(
        layout=layout,
        form=form,
        shape=(rows, columns),
        words=words,
        scales=_padded_to(weight.scales, per_scale, fill=1),
        zeros=None if weight.zeros is None else _padded_to(weight.zeros, per_scale, fill=0),
    )


def unpack_from_device(weight: PackedWeight) -> QuantizedWeight:
    """Undo `pack_for_device`, exactly.

    Raises:
        InvalidCheckpoint: the layout is unknown or does not take the format, or there are more or fewer words
            than the shape needs.
    """
    form, shape = weight.form, weight.shape
    _check_layout(weight.layout, form)
    wanted = padded(shape[0]) * padded(shape[1]) * form.bits // 32
    if weight.words.shape != (wanted,):
        raise InvalidCheckpoint(
            f"{weight.layout} of {shape} has {wanted} words, not {tuple(weight.words.shape)}"
        )
    if weight.layout == INTERLEAVED:
        codes = unpack_interleaved(weight.words, form.bits, shape)
    elif form.minifloat is not None:
        codes = unpack_direct(weight.words, form.minifloat, shape)
    else:
        codes = unpack_integers(weight.words, form.bits, shape)
    kept = tuple(slice(size) for size in _scales_shape(shape, form))
    return QuantizedWeight(
        form=form,
        codes=codes,
        scales=weight.scales[kept].clone(),
        zeros=None if weight.zeros is None else weight.zeros[kept].clone(),
    )


def _scales_shape(shape: tuple[int, int], form: WeightFormat) -> tuple[int, ...]:
    rows, columns = shape
    return (rows,) if form.group_size is None else (rows, -(-columns // form.group_size))


def _padded_to(tensor: Tensor, shape: tuple[int, ...], *, fill: int) -> Tensor:
    full = torch.full(shape, fill, dtype=tensor.dtype)
    full[tuple(slice(size) for size in tensor.shape)] = tensor
    return full


def _check_layout(layout: str, form: WeightFormat) -> None:
    if layout not in LAYOUTS:
        raise InvalidCheckpoint(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    is_taken = layout == DIRECT
    if form.minifloat is not None:
        is_taken = layout == INTERLEAVED or takes(form.minifloat)
    if not is_taken:
        raise InvalidCheckpoint(f"layout {layout} does not take {form.name}")
