"""The CPU kernels' library: find it, load it, and what its calls look like from Python."""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from trireme.errors import InvalidConfiguration
from trireme.kernels import cpu_build

_log = logging.getLogger(__name__)

MOST: Final = "TRIREME_CPU_KERNELS"
"""The environment variable that names the best `Level` to use, in small letters."""


class Level(enum.IntEnum):
    """The instruction sets that there are kernels for, each with all before it."""

    NONE = 0
    AVX2 = 1
    """And FMA."""
    AVX512 = 2
    """F, BW, VL, DQ and VNNI."""
    AMX = 3
    """Tiles of int8 and bfloat16."""


class NativeFormat(enum.IntEnum):
    """How a weight's words are to be read (`Format` in linear.h)."""

    INT8 = 0
    INT4 = 1
    FLOAT6 = 2
    FLOAT5 = 3
    BFLOAT16 = 4


class NativeWeight(ctypes.Structure):
    """`Weight` in linear.h. It points into tensors; whoever holds it holds them too."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("power", ctypes.c_int8 * 16),
        ("mantissa", ctypes.c_uint8 * 16),
        ("unit", ctypes.c_float),
        ("input_order", ctypes.c_void_p),
    )


class NativeCall(ctypes.Structure):
    """`Call` in linear.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLibrary:
    """The loaded library."""

    level: Level
    """The best that this CPU has."""
    linear: Callable[[Any, int, int], int]
    """Takes the address of a `NativeCall`, the level and the threads; returns 0, or what went wrong. Runs
    without the interpreter's lock."""
    decoder_layers: Callable[[Any, Any, int, int, Any, Any, int, int], int]
    """Takes the addresses of a shape and of layers (`decoder_cpu`), the first and one past the last of them
    to run, the addresses of the head that follows, or None, and of a step, the level and the threads; as
    `linear`."""
    read: Callable[[int, int, int], int]
    """Takes an address, a number of bytes and the threads, reads them, and returns their sum as 64-bit words:
    nothing that uses all of the bytes can be faster."""


@functools.cache
def cpu_library() -> CpuLibrary | None:
    """Load the library once; None, with a line in the log that says why, where PyTorch has to serve.

    Raises:
        InvalidConfiguration: TRIREME_CPU_KERNELS is set to what is no level.
    """
    if not cpu_build.is_supported():
        _log.info("cpu_kernels_absent", extra={"reason": "not x86-64 with Linux"})
        return None
    try:
        native = ctypes.CDLL(str(cpu_build.library_path()))
    except OSError as error:
        advice = "run python -m trireme.kernels.cpu_build"
        _log.warning("cpu_kernels_absent", extra={"reason": str(error), "advice": advice})
        return None
    native.trireme_linear.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    native.trireme_decoder_layers.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    )
    native.trireme_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    native.trireme_read.restype = ctypes.c_uint64
    level = min(Level(native.trireme_level()), _most())
    if level is Level.NONE:
        _log.info("cpu_kernels_absent", extra={"reason": f"the CPU has no AVX2, or {MOST} says none"})
        return None
    return CpuLibrary(
        level=level,
        linear=native.trireme_linear,
        decoder_layers=native.trireme_decoder_layers,
        read=native.trireme_read,
    )


def _most() -> Level:
    named = os.environ.get(MOST)
    if named is None:
        return Level.AMX
    levels = {level.name.lower(): level for level in Level}
    if named not in levels:
        raise InvalidConfiguration(f"{MOST} must be one of {', '.join(levels)}, not {named[:40]!r}")
    return levels[named]
