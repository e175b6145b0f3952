"""The weights of one model on their way from a checkpoint to a device.

An architecture asks by name and shape, and does not know whether its linear layers are stored in high
precision, in few bits, or are quantized on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.kernels import ops
from trireme.kernels.ops import LinearWeight
from trireme.models.checkpoint import Checkpoint
from trireme.quant.few_bit_weights import FewBitWeights
from trireme.quant.quantization import QuantizedWeight, concatenate, dequantize, have_one_order, select_rows

Part = tuple[str, int]
"""A weight's name, and its outputs."""


class ModelWeights:
    """Reads a checkpoint's weights onto `device`; what is not in few bits becomes `dtype`.

    Args:
        checkpoint: an open checkpoint.
        few_bits: its linear layers in few bits; None: there are none.
        device: where the weights go.
        dtype: float32, bfloat16 or float16: what is computed in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        few_bits: FewBitWeights | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = checkpoint.config
        self.device = device
        self.dtype = dtype
        self.stored_bytes = 0
        """Of the linear weights in few bits that were read, as they are stored."""
        self.expanded_bytes = 0
        """Of those among them that had to be brought to `dtype`, afterwards."""
        self._checkpoint = checkpoint
        self._few_bits = few_bits

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint or self._is_in_few_bits(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in `dtype`, whatever it is stored in.

        Raises:
            InvalidCheckpoint: it is missing or has another shape; names it.
        """
        return self._stored(name, shape).to(self.device, self.dtype)

    def norm(self, name: str, width: int) -> Tensor:
        """The weight of an RMS norm as `ops.rms_norm` takes it: (width,).

        Raises:
            InvalidCheckpoint: it is missing or has another shape; names it.
        """
        weight = self._stored(name, (width,))
        if self.config.norm_adds_one:
            weight = weight.float() + 1.0
        return weight.to(self.device, self.dtype)

    def linear(
        self,
        parts: Sequence[Part],
        inputs: int,
        *,
        is_transposed: bool = False,
        row_order: Tensor | None = None,
    ) -> LinearWeight:
        """The weights of layers that read the same inputs as one matrix, the first on top.

        Args:
            parts: name and outputs of each.
            inputs: of all of them.
            is_transposed: high-precision weights are stored as (inputs, outputs); codes never are.
            row_order: where each row of the result comes from, (outputs of all,) int64; None: they stay.

        Raises:
            InvalidCheckpoint: one is missing or has another shape; names it.
        """
        quantized = self._one_quantized(parts, inputs)
        if quantized is not None:
            if row_order is not None:
                quantized = select_rows(quantized, row_order)
            self.stored_bytes += quantized.stored_bytes
            packed = ops.pack_quantized(quantized, device=self.device, dtype=self.dtype)
            if isinstance(packed, Tensor):
                self.expanded_bytes += quantized.codes.numel() * self.dtype.itemsize
            return packed
        matrices = [self._matrix(name, (rows, inputs), is_transposed=is_transposed) for name, rows in parts]
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if row_order is not None:
            matrix = matrix.index_select(0, row_order)
        return ops.pack_weight(matrix.to(self.device), self.dtype)

    def head(self, embedding: Tensor, embedding_name: str) -> LinearWeight:
        """What scores tokens, (vocabulary, hidden): `lm_head`, or the embedding where it serves as both.

        Raises:
            InvalidCheckpoint: `lm_head` is missing or has another shape.
        """
        rows, inputs = embedding.shape
        if not self.config.tie_embeddings:
            return self.linear([("lm_head.weight", rows)], inputs)
        if self._is_in_few_bits(embedding_name) or ops.takes_bf16(self.device, self.dtype):
            return self.linear([(embedding_name, rows)], inputs)
        return ops.pack_weight(embedding)

    def _one_quantized(self, parts: Sequence[Part], inputs: int) -> QuantizedWeight | None:
        """All parts in few bits as one; None: one is not, or they order their inputs differently."""
        if not all(self._is_in_few_bits(name) for name, _ in parts):
            return None
        quantized = [self._quantized(name, (rows, inputs)) for name, rows in parts]
        return concatenate(quantized) if have_one_order(quantized) else None

    def _matrix(self, name: str, shape: tuple[int, int], *, is_transposed: bool) -> Tensor:
        """(outputs, inputs) on the CPU."""
        if self._is_in_few_bits(name) or not is_transposed:
            return self._stored(name, shape)
        return self._stored(name, shape[::-1]).t().contiguous()

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """On the CPU, in the type it is stored in; codes in `dtype`."""
        if self._is_in_few_bits(name):
            return dequantize(self._quantized(name, shape), self.dtype)
        return self._checkpoint.tensor(name, shape)

    def _is_in_few_bits(self, name: str) -> bool:
        return self._few_bits is not None and name in self._few_bits

    def _quantized(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        assert self._few_bits is not None
        quantized = self._few_bits.weight(name)
        if tuple(quantized.codes.shape) != shape:
            raise InvalidCheckpoint(
                f"{self._checkpoint.directory}: quantized weight {name} has shape "
                f"{tuple(quantized.codes.shape)}, but config.json asks for {shape}"
            )
        return quantized
