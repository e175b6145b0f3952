"""Linear layers on x86 CPUs with weights of 4 to 16 bits.

A packed weight is opaque: `linear` alone reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidConfiguration
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import QuantizedWeight, dequantize

_ACTIVATIONS: Final = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """One matrix of M output and K input channels, in the order in which the kernels read it."""

    form: WeightFormat | None
    """None: bfloat16 weights."""
    shape: tuple[int, int]
    """(M, K), without padding."""
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def takes(form: WeightFormat, dtype: torch.dtype) -> bool:
    """Whether `linear` runs on weights of this format and activations of this type here."""
    return dtype in _ACTIVATIONS


def pack(weight: QuantizedWeight) -> PackedLinear:
    """Bring a quantized matrix into the kernels' order."""
    rows, columns = weight.codes.shape
    return PackedLinear(
        form=weight.form,
        shape=(rows, columns),
        words=weight.codes,
        scales=weight.scales,
        zeros=weight.zeros,
    )


def pack_bf16(weight: Tensor) -> PackedLinear:
    """Bring a matrix (outputs, inputs) into the kernels' order, its elements rounded to bfloat16."""
    rows, columns = weight.shape
    return PackedLinear(form=None, shape=(rows, columns), words=weight.bfloat16(), scales=torch.ones(rows))


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x times the packed weight transposed, plus bias, plus residual.

    Args:
        x: (rows, inputs) float32 or bfloat16 on the CPU.
        packed: the weight.
        bias: (outputs,) of x's type.
        residual: (rows, outputs) of x's type.

    Returns:
        (rows, outputs) of x's type.

    Raises:
        InvalidConfiguration: x is of another type or width.
    """
    if x.dtype not in _ACTIVATIONS or x.shape[-1] != packed.shape[1]:
        raise InvalidConfiguration(f"activations {tuple(x.shape)} of {x.dtype} do not fit {packed.shape}")
    if packed.form is None:
        weight = packed.words.float()
    else:
        weight = dequantize(
            QuantizedWeight(form=packed.form, codes=packed.words, scales=packed.scales, zeros=packed.zeros)
        )
    out = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return (out if residual is None else out + residual.float()).to(x.dtype)
