"""Linear layers on x86 CPUs with weights packed for oneDNN.

oneDNN reads weights in blocks that fit its registers. Packing once at load saves the repacking
in every call and reaches vector units that the default matrix library may leave idle. A packed
weight is an opaque tensor: only `linear` and `linear_add` read it.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor

_ROWS_HINT: Final = 16
"""Rows of a typical batch: the blocks chosen for it also suit 1 row and 512."""


@functools.cache
def is_available(dtype: torch.dtype) -> bool:
    """This build of PyTorch has the operators, this CPU runs them on `dtype`, and the answer is right.

    Packed bfloat16 needs AVX-512 or AVX-NE-CONVERT; float32 runs everywhere.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        x, weight = torch.ones(2, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
        packed = _ops()._reorder_linear_weight(weight, _ROWS_HINT)
        doubled = linear_add(x, packed, linear(x, packed, None), None)
    except (AttributeError, RuntimeError):
        return False
    return bool((doubled == 32.0).all())


def pack(weight: Tensor) -> Tensor:
    """Pack a weight (outputs, inputs) of float32 or bfloat16 on the CPU; the shape stays readable."""
    packed: Tensor = _ops()._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, inputs) times the packed weight transposed, plus bias: (rows, outputs)."""
    out: Tensor = _ops()._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def linear_add(x: Tensor, packed: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`, plus residual (rows, outputs), in one pass."""
    out: Tensor = _ops()._linear_pointwise.binary(x, residual, packed, bias, "add")
    return out


def _ops() -> Any:
    return torch.ops.mkldnn
