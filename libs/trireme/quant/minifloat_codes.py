"""Tensors of floats of a few bits: values to codes and back."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from trireme.quant.minifloat import Minifloat


def values_of(form: Minifloat) -> Tensor:
    """(2**bits,) float64: the value of each code, in the order of codes."""
    return _value_table(form)


def encode(form: Minifloat, values: Tensor) -> Tensor:
    """Round to the nearest value, ties to the even mantissa; what is too large becomes the largest.

    Args:
        form: of the codes.
        values: float64, any shape, no NaN; the sign of a zero is kept.

    Returns:
        uint8 codes of the same shape.
    """
    magnitude = torch.bucketize(values.abs(), _upper_bounds(form), out_int32=True).to(torch.uint8)
    return magnitude + values.signbit().to(torch.uint8) * form.sign_bit


def decode(form: Minifloat, codes: Tensor) -> Tensor:
    """The float64 values of uint8 codes below 2**bits; exact."""
    return _value_table(form)[codes.int()]


@functools.cache
def _value_table(form: Minifloat) -> Tensor:
    positive = torch.tensor(form.magnitudes, dtype=torch.float64)
    return torch.cat((positive, -positive))


@functools.cache
def _upper_bounds(form: Minifloat) -> Tensor:
    """The largest magnitude that still rounds to each code but the last; float64, ascending."""
    midpoints = torch.tensor(
        [(low + high) / 2 for low, high in itertools.pairwise(form.magnitudes)], dtype=torch.float64
    )
    is_odd = torch.arange(len(midpoints)) % 2 == 1
    # A midpoint goes to its even neighbour; above an odd code that is the next one.
    return torch.where(is_odd, torch.nextafter(midpoints, torch.zeros_like(midpoints)), midpoints)
