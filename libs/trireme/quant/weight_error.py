"""How far quantized weights are from those that they replace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from trireme.quant.quantization import QuantizedWeight, dequantize_rows, row_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """Of one matrix, or of several pooled."""

    elements: int
    max_abs: float
    """The largest difference of one weight, in the weights' own unit."""
    squared_error: float
    """Sum over all weights."""
    squared_norm: float
    """Of the weights before."""

    @property
    def relative_frobenius(self) -> float:
        """Norm of the difference over norm of the weights; 0 where all are zero and stayed it."""
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else math.inf


def weight_error(weight: Tensor, quantized: QuantizedWeight) -> WeightError:
    """Compare a matrix with its quantized form, in float64.

    Args:
        weight: (M, K), of a floating type.
        quantized: of the same shape.
    """
    max_abs, squared_error, squared_norm = 0.0, 0.0, 0.0
    for rows in row_blocks(*weight.shape):
        before = weight[rows].double()
        difference = dequantize_rows(quantized, rows) - before
        max_abs = max(max_abs, float(difference.abs().amax()))
        squared_error += float(difference.square().sum())
        squared_norm += float(before.square().sum())
    return WeightError(
        elements=weight.numel(), max_abs=max_abs, squared_error=squared_error, squared_norm=squared_norm
    )


def pooled(errors: Iterable[WeightError]) -> WeightError:
    """The error of all matrices taken as one."""
    parts = tuple(errors)
    return WeightError(
        elements=sum(part.elements for part in parts),
        max_abs=max((part.max_abs for part in parts), default=0.0),
        squared_error=math.fsum(part.squared_error for part in parts),
        squared_norm=math.fsum(part.squared_norm for part in parts),
    )
