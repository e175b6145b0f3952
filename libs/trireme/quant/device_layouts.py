"""Codes in the order that a device's kernels read them, by layout id. Derived, never the only copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant import direct_layout, interleaved_layout
from trireme.quant.direct_layout import DIRECT, pack_direct, unpack_direct
from trireme.quant.formats import WeightFormat
from trireme.quant.fragment_order import padded
from trireme.quant.interleaved_layout import INTERLEAVED, pack_interleaved, unpack_interleaved
from trireme.quant.quantization import QuantizedWeight

LAYOUTS: Final = (INTERLEAVED, DIRECT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """One matrix of M output and K input channels in a device's layout."""

    layout: str
    form: WeightFormat
    shape: tuple[int, int]
    """(M, K) without padding."""
    words: Tensor
    """(words,) int32, of M and K padded to multiples of 64 with code 0."""
    scales: Tensor
    """(M padded,) float32; 1 where there is no row."""


def pack_for_device(weight: QuantizedWeight, layout: str) -> PackedWeight:
    """Bring a matrix into a device's layout. Shard first, then pack: tiles cannot be cut.

    Raises:
        InvalidCheckpoint: the layout is unknown or does not take the weight's format.
    """
    _check_layout(layout, weight.form)
    rows, columns = weight.codes.shape
    packed = (
        pack_direct(weight.codes) if layout == DIRECT else pack_interleaved(weight.codes, weight.form.bits)
    )
    scales = torch.ones(padded(rows))
    scales[:rows] = weight.scales
    return PackedWeight(layout=layout, form=weight.form, shape=(rows, columns), words=packed, scales=scales)


def unpack_from_device(weight: PackedWeight) -> QuantizedWeight:
    """Undo `pack_for_device`, exactly.

    Raises:
        InvalidCheckpoint: the layout is unknown or does not take the format, or there are more or fewer words
            than the shape needs.
    """
    _check_layout(weight.layout, weight.form)
    is_direct = weight.layout == DIRECT
    wanted = (
        direct_layout.num_words(weight.shape)
        if is_direct
        else interleaved_layout.num_words(weight.shape, weight.form.bits)
    )
    if weight.words.shape != (wanted,):
        raise InvalidCheckpoint(
            f"{weight.layout} of {weight.shape} has {wanted} words, not {tuple(weight.words.shape)}"
        )
    codes = (
        unpack_direct(weight.words, weight.shape)
        if is_direct
        else unpack_interleaved(weight.words, weight.form.bits, weight.shape)
    )
    return QuantizedWeight(form=weight.form, codes=codes, scales=weight.scales[: weight.shape[0]].clone())


def _check_layout(layout: str, form: WeightFormat) -> None:
    if layout not in LAYOUTS:
        raise InvalidCheckpoint(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if form.minifloat is None or (layout == DIRECT and form.name != "fp6_e3m2"):
        taken = "fp6_e3m2" if layout == DIRECT else "fp6_e3m2, fp6_e2m3 and fp5_e2m2"
        raise InvalidCheckpoint(f"layout {layout} takes {taken}, not {form.name}")
