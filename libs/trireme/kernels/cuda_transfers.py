"""Small things to a GPU and back, without holding up the host: one copy there, one event on the way back.

On the CPU, where the emulator runs, the way back is no way at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT: Final = 16
"""Bytes; what kernels ask of a tensor's start."""
_TYPES: Final[Mapping[np.dtype[Any], torch.dtype]] = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Parcel:
    """Tensors that share one piece of a device's memory, so that one copy fills them all.

    Args:
        arrays: what they hold at first: int32, int64, float32 or float64.
    """

    __slots__ = ("_places", "_there", "tensors")

    def __init__(self, arrays: Mapping[str, NDArray[Any]], device: torch.device) -> None:
        self._places: dict[str, int] = {}
        end = 0
        for name, array in arrays.items():
            self._places[name] = end
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._there = torch.empty(end, dtype=torch.uint8, device=device)
        self.refill(arrays)
        self.tensors = {name: self._view(name, array) for name, array in arrays.items()}
        """By name, of each array's shape and type; each begins at a multiple of 16 bytes."""

    def refill(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Give the tensors other values; `arrays` have the names, shapes and types of the first ones."""
        # Page-locked memory is PyTorch's own, which does not give it out again before it is read.
        packed = torch.empty(len(self._there), dtype=torch.uint8, pin_memory=self._there.is_cuda)
        host = packed.numpy()
        for name, array in arrays.items():
            place = self._places[name]
            host[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._there.copy_(packed, non_blocking=True)

    def _view(self, name: str, array: NDArray[Any]) -> Tensor:
        place = self._places[name]
        return self._there[place : place + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)


def upload(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Bring arrays of int32, int64, float32 and float64 to a device, all in one copy; never waits."""
    return Parcel(arrays, device).tensors


class Download(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[Tensor]:
        """They are there."""


def download(tensors: Sequence[Tensor]) -> Download:
    """Begin to bring tensors of one device to the host. Never waits."""
    if tensors and tensors[0].is_cuda:
        return _CudaDownload(tensors)
    return _Here(tensors)


class _Here:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    def wait(self) -> list[Tensor]:
        return self._tensors


class _CudaDownload:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
        for here, there in zip(self._tensors, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        self._done.synchronize()
        return self._tensors
