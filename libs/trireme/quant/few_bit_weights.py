"""What a model is loaded from where its linear layers have few bits."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import QuantizedWeight, quantize
from trireme.quant.weight_files import CONFIG, open_weights, read_object, read_tensor, tensor_files
from trireme.quant.weight_kinds import is_stored_transposed, linear_kinds, weight_kind

log = logging.getLogger(__name__)

_PROGRESS_S: Final = 10.0
"""Seconds between two lines about a checkpoint that takes long to quantize."""


class FewBitWeights(Protocol):
    """The linear layers of an open checkpoint, wherever their codes come from."""

    @property
    def form(self) -> WeightFormat:
        """The format of all of them."""

    def __contains__(self, name: object) -> bool:
        """Whether the weight of that name is in few bits."""

    def weight(self, name: str) -> QuantizedWeight:
        """One matrix, (output channels, input channels).

        Raises:
            InvalidCheckpoint: there is none of that name, or its tensors are not what the format asks for.
        """

    def close(self) -> None:
        """Unmap the files; what was read stays valid."""


class QuantizedAtLoad:
    """The linear layers of a checkpoint in high precision, quantized as they are asked for.

    Codes and scales equal those of `trireme quantize`.

    Raises:
        InvalidCheckpoint: files are missing or damaged.
    """

    def __init__(self, directory: Path, form: WeightFormat) -> None:
        self.directory = directory
        self.form = form
        self._model_type = read_object(directory / CONFIG).get("model_type")
        kinds = linear_kinds(self._model_type)
        files = tensor_files(directory)
        self._files = {name: file for name, file in files.items() if weight_kind(name) in kinds}
        self._handles: dict[Path, Any] = {file: open_weights(file) for file in set(self._files.values())}
        self._num_done = 0
        self._told_s = time.monotonic()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def weight(self, name: str) -> QuantizedWeight:
        """Read and quantize one matrix.

        Raises:
            InvalidCheckpoint: there is none of that name, or it cannot be quantized: see `quantize`.
        """
        file = self._files.get(name)
        if file is None:
            raise InvalidCheckpoint(f"{self.directory}: {name} is no weight of a linear layer")
        quantized = quantize(self._matrix(name, file), self.form, name=f"{file}: {name}")
        self._num_done += 1
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_S:
            self._told_s = now_s
            log.info(
                "quantizing_weights",
                extra={
                    "checkpoint": str(self.directory),
                    "format": self.form.name,
                    "matrices_done": self._num_done,
                    "matrices": len(self._files),
                },
            )
        return quantized

    def close(self) -> None:
        """Unmap the files."""
        self._handles.clear()

    def _matrix(self, name: str, file: Path) -> Tensor:
        tensor = read_tensor(self._handles[file], name, file)
        is_transposed = is_stored_transposed(weight_kind(name), self._model_type)
        return tensor.T.contiguous() if is_transposed and tensor.dim() == 2 else tensor
