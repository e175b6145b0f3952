"""The weights of all experts of a layer as one tensor, in the order in which CUDA kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trireme.kernels import cuda_linear
from trireme.kernels.cuda_launch import TYPE_NAMES
from trireme.quant.device_layouts import DIRECT, PackedWeight
from trireme.quant.formats import WeightFormat
from trireme.quant.fragment_order import LANES, to_lanes

ExpertMatrix = Tensor | PackedWeight
"""Of one expert: (outputs, inputs)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedExperts:
    """One matrix (outputs, inputs) of each expert."""

    form: WeightFormat | None
    """None: 16-bit weights, of `dtype`."""
    dtype: torch.dtype | None
    """Of the activations; None: any that kernels take."""
    shape: tuple[int, int]
    """(outputs, inputs), without padding."""
    words: Tensor
    """(experts, words) int32: of each expert those of `direct_v1`, or `fragments` of 16 bits."""
    scales: Tensor | None
    """float32, (experts, outputs padded) or (experts, outputs padded, groups); None: 16-bit weights."""
    zeros: Tensor | None = None
    """uint8 of the shape of `scales`; only in formats that have zero points."""

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 16 if self.form is None else self.form.bits

    @property
    def num_experts(self) -> int:
        return len(self.words)

    @property
    def nbytes(self) -> int:
        """Of all experts."""
        return sum(part.nbytes for part in (self.words, self.scales, self.zeros) if part is not None)


def can_stack(matrices: Sequence[object]) -> bool:
    """Whether `stack` takes them: one shape, in multiples of 8, and one format, 16 bits or with a kernel."""
    first = matrices[0]
    if not isinstance(first, (Tensor, PackedWeight)) or any(size % 8 for size in first.shape):
        return False
    return all(isinstance(each, type(first)) and _is_alike(first, each) for each in matrices)


def stack(matrices: Sequence[ExpertMatrix]) -> PackedExperts:
    """Lay the experts' matrices one after the other, on the device on which they are."""
    first = matrices[0]
    if isinstance(first, PackedWeight):
        packed = [matrix for matrix in matrices if isinstance(matrix, PackedWeight)]
        zeros = [matrix.zeros for matrix in packed if matrix.zeros is not None]
        return PackedExperts(
            form=first.form,
            dtype=None,
            shape=first.shape,
            words=torch.stack([matrix.words for matrix in packed]),
            scales=torch.stack([matrix.scales for matrix in packed]),
            zeros=torch.stack(zeros) if zeros else None,
        )
    plain = [fragments(matrix) for matrix in matrices if isinstance(matrix, Tensor)]
    return PackedExperts(
        form=None,
        dtype=first.dtype,
        shape=(first.shape[0], first.shape[1]),
        words=torch.stack(plain),
        scales=None,
    )


def fragments(weight: Tensor) -> Tensor:
    """(outputs, inputs) of 16 bits to (words,) int32: 16 words a lane and slice, all lanes' first first."""
    pairs = to_lanes(weight).view(-1, LANES, 16, 2).transpose(1, 2)
    return pairs.contiguous().view(torch.int32).view(-1)


def _is_alike(first: ExpertMatrix, other: object) -> bool:
    if isinstance(first, PackedWeight):
        is_taken = first.layout == DIRECT and cuda_linear.takes(first.form)
        return (
            is_taken
            and isinstance(other, PackedWeight)
            and (other.layout, other.form, other.shape) == (first.layout, first.form, first.shape)
        )
    return (
        isinstance(other, Tensor)
        and not other.is_mkldnn
        and (other.dtype, other.shape) == (first.dtype, first.shape)
        and first.dtype in TYPE_NAMES
    )
