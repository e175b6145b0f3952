"""What a launch of a kernel is: which instantiation, over which grid, with which arguments.

`cuda_device` launches on a GPU, `cuda_emulator` on a CPU. The operators in `cuda_ops`, `cuda_attention`,
`cuda_linear` and `cuda_sampling` check every tensor, then launch through either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from trireme.errors import Kind, TriremeError

SOURCES: Final = Path(__file__).parent / "csrc" / "cuda"
TYPE_NAMES: Final = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""Types of kernels, as `csrc/cuda/prim.cuh` calls them."""
CODE_NAMES: Final = {torch.int8: "Int8Code", torch.uint8: "Fp8Code"}
"""Types of caches in 8 bits by their storage (`kernels.kv_forms`), as `csrc/cuda/kv_codes.cuh` calls them."""
SCALE_BYTES: Final = 4
"""Behind the codes of a row of such a cache."""

Argument = Tensor | None | np.int32 | np.int64 | np.float32
"""A pointer, or a number of exactly the kernel's type."""
_C_TYPES: Final[Mapping[type, type[ctypes._SimpleCData[Any]]]] = {
    np.int32: ctypes.c_int32,
    np.int64: ctypes.c_int64,
    np.float32: ctypes.c_float,
}


class ShapeMismatch(TriremeError):
    """A tensor's shape, type, device or layout is not what the kernel takes."""

    kind = Kind.INVALID
    code = "shape_mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One instantiation of a kernel template."""

    source: str
    """File in `csrc/cuda`, without `.cu`."""
    name: str
    """C++ name with template arguments: `rms_norm<bf16, 8>`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Over what a kernel runs."""

    grid: tuple[int, int, int]
    """Blocks; none of the three may be 0."""
    threads: int
    """Of a block, a multiple of 32."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""


class Launcher(Protocol):
    """A device that runs kernels."""

    @property
    def multiprocessors(self) -> int:
        """Blocks that run side by side, counting one on each multiprocessor."""

    @property
    def has_wgmma(self) -> bool:
        """Whether it runs kernels named `sm90_...`: compute capability 9.0, neither older nor newer."""

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        """Run a kernel, in order with what was launched before on the current stream."""


class PackedArguments:
    """Arguments as a launch takes them: an array of pointers to values, alive as long as this is."""

    __slots__ = ("_values", "pointers")

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self._values = [_c_value(argument) for argument in arguments]
        self.pointers = (ctypes.c_void_p * max(1, len(arguments)))(
            *(ctypes.addressof(value) for value in self._values)
        )


def _c_value(argument: Argument) -> ctypes._SimpleCData[Any]:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return _C_TYPES[type(argument)](argument.item())


def ceil_div(amount: int, size: int) -> int:
    """How many pieces of `size` hold `amount`."""
    return -(-amount // size)


def type_name(tensor: Tensor, name: str) -> str:
    """A tensor's element type in kernels.

    Raises:
        ShapeMismatch: kernels are for float16 and bfloat16.
    """
    found = TYPE_NAMES.get(tensor.dtype)
    if found is None:
        raise ShapeMismatch(f"{name} is of type {tensor.dtype}; CUDA kernels take float16 and bfloat16")
    return found


def check(
    tensor: Tensor,
    name: str,
    *,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
    is_contiguous: bool = True,
    alignment_bytes: int = 16,
) -> None:
    """Check one tensor against what a kernel takes; None in `shape` is any size.

    Raises:
        ShapeMismatch: it differs; names the tensor and both.
    """
    fits = len(tensor.shape) == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted_shape = tuple("any" if size is None else size for size in shape)
        raise ShapeMismatch(f"{name} has shape {tuple(tensor.shape)}, not {wanted_shape}")
    if tensor.dtype != dtype:
        raise ShapeMismatch(f"{name} is of type {tensor.dtype}, not {dtype}")
    if tensor.device != device:
        raise ShapeMismatch(f"{name} is on {tensor.device}, not {device}")
    if is_contiguous and not tensor.is_contiguous():
        raise ShapeMismatch(f"{name} is not contiguous")
    if tensor.data_ptr() % alignment_bytes:
        raise ShapeMismatch(f"{name} does not start at a multiple of {alignment_bytes} bytes")


def check_multiple(size: int, of: int, name: str) -> None:
    """Refuse a size that is no multiple of another.

    Raises:
        ShapeMismatch: says both.
    """
    if size % of:
        raise ShapeMismatch(f"{name} is {size}, no multiple of {of}")


def check_rows(x: Tensor, name: str) -> None:
    """Refuse rows that cannot be read 16 bytes at a time.

    Raises:
        ShapeMismatch: names the tensor.
    """
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        raise ShapeMismatch(f"the rows of {name} must start at multiples of 16 bytes and be contiguous")
