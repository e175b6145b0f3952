"""What keys and values are stored as: the model's own type, bfloat16, or 8 bits with a scale per row.

A row of the cache is one token's key or value of one head. In 8 bits it has its codes, and behind them the
bytes of its scale: a block is still one tensor that can be copied, saved and swapped without being read.
Rows are rounded alone, so what is read does not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trireme.errors import InvalidConfiguration

_SCALE_BYTES: Final = 4
"""float32, in the machine's order of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvForm:
    """How one number of a key or value is stored."""

    name: str
    storage: torch.dtype
    """Of the cache; tells forms apart where only the tensor is at hand. Codes of float8_e4m3fn are uint8."""
    largest: float | None = None
    """The value of the largest code, which a row's largest magnitude gets; None: plain numbers."""

    def row_elements(self, head_dim: int) -> int:
        """Elements of `storage` that one row takes."""
        return head_dim if self.largest is None else head_dim + _SCALE_BYTES


INT8: Final = KvForm(name="int8", storage=torch.int8, largest=127.0)
FP8: Final = KvForm(name="fp8", storage=torch.uint8, largest=448.0)
BF16: Final = KvForm(name="bfloat16", storage=torch.bfloat16)
KV_DTYPES: Final[Mapping[str, KvForm | None]] = {"auto": None, "bf16": BF16, "int8": INT8, "fp8": FP8}
"""By the names that fleet.yaml has for them; None: as the model computes."""
_CODED: Final = {form.storage: form for form in (INT8, FP8)}


def kv_form(kv_dtype: str, dtype: torch.dtype) -> KvForm:
    """The form of a model's cache.

    Args:
        kv_dtype: one of `KV_DTYPES`.
        dtype: what the model computes in.

    Raises:
        InvalidConfiguration: there is no such form; names those that there are.
    """
    if kv_dtype not in KV_DTYPES:
        raise InvalidConfiguration(
            f"kv_dtype {kv_dtype!r} does not exist; use one of {', '.join(KV_DTYPES)}", param="kv_dtype"
        )
    form = KV_DTYPES[kv_dtype]
    return KvForm(name=str(dtype).removeprefix("torch."), storage=dtype) if form is None else form


def encode(rows: Tensor, storage: torch.dtype) -> Tensor:
    """Bring keys or values into the form that a cache of type `storage` holds.

    A scale is the row's largest magnitude over that of the codes, 1 for a row of zeros; codes are rounded to
    nearest, ties to even. A row that has a NaN or an infinity reads back as NaN.

    Args:
        rows: (..., head_dim), floating.

    Returns:
        (..., row_elements) of `storage`.
    """
    form = _CODED.get(storage)
    if form is None or form.largest is None:
        return rows.to(storage)
    values = rows.float()
    peak = values.abs().amax(-1, keepdim=True)
    scale = torch.where(peak == 0, torch.ones_like(peak), peak / form.largest)
    scaled = (values / scale).clamp_(-form.largest, form.largest)
    if form is INT8:
        codes = scaled.round_().nan_to_num_(0.0).to(torch.int8)
    else:
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat((codes, scale.view(storage)), -1)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `encode`, but for the rounding: (..., head_dim) of `dtype`."""
    form = _CODED.get(stored.dtype)
    if form is None:
        return stored.to(dtype)
    codes = stored[..., :-_SCALE_BYTES]
    scale = stored[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    if form is FP8:
        codes = codes.contiguous().view(torch.float8_e4m3fn)
    return (codes.float() * scale).to(dtype)
