"""Run CUDA kernels on an x86-64 CPU, every access checked: what tests are for.

g++ compiles the same `.cu` files with `csrc/emulator` in place of CUDA. Each launch runs twice, the second
time with blocks, warps and lanes in the opposite order; both must leave the same bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trireme.errors import Kind, TriremeError
from trireme.kernels.cuda_launch import SOURCES, Argument, Geometry, Kernel, PackedArguments

_EMULATOR: Final = SOURCES.parent / "emulator"
_RUNTIME: Final = ("machine", "memory_checks", "thread_operations")
_OPTIONS: Final = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
# Instrumented; no vectors and no merged stores, so that each access is one of the kernel's own.
_KERNEL_OPTIONS: Final = (
    "-O1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize",
    "-DTRIREME_EMULATOR",
)
_MESSAGE_BYTES: Final = 1024


class EmulatedKernelFault(TriremeError):
    """A kernel did what it must not: a race, a divergent collective, an access out of bounds."""

    kind = Kind.ABORTED
    code = "emulated_kernel_fault"


class EmulatorUnavailable(TriremeError):
    """The emulator needs g++ on an x86-64 machine; or g++ does not take the kernel."""

    kind = Kind.UNAVAILABLE
    code = "emulator_unavailable"


def is_available() -> bool:
    """Whether this machine can build and run the emulator."""
    return platform.machine() == "x86_64" and shutil.which("g++") is not None


class Emulator:
    """A launcher on the CPU.

    Args:
        build_directory: where compiled kernels are kept, named by a hash of what they were made of.
        sources: folder of the `.cu` files.
        multiprocessors: what it says it has.
        has_wgmma: what it says it is: compute capability 9.0, or any other.
    """

    __slots__ = ("_build", "_entries", "_has_wgmma", "_multiprocessors", "_sources")

    def __init__(
        self,
        build_directory: Path,
        *,
        sources: Path = SOURCES,
        multiprocessors: int = 4,
        has_wgmma: bool = False,
    ) -> None:
        if not is_available():
            raise EmulatorUnavailable("the CUDA emulator needs g++ on an x86-64 machine; install g++")
        self._build = build_directory
        self._sources = sources
        self._multiprocessors = multiprocessors
        self._has_wgmma = has_wgmma
        self._entries: dict[Kernel, tuple[ctypes.CDLL, ctypes.c_void_p]] = {}

    @property
    def multiprocessors(self) -> int:
        return self._multiprocessors

    @property
    def has_wgmma(self) -> bool:
        return self._has_wgmma

    def prepare(self, kernels: Iterable[Kernel], *, threads: int = 2) -> None:
        """Compile kernels, those of one source together, several sources side by side."""
        by_source: dict[str, list[Kernel]] = {}
        for kernel in dict.fromkeys(kernels):
            if kernel not in self._entries:
                by_source.setdefault(kernel.source, []).append(kernel)
        runtime = self._runtime()
        with ThreadPoolExecutor(threads) as pool:
            for built in pool.map(lambda group: self._compile(group, runtime), by_source.values()):
                self._entries.update(built)

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        """Run a kernel in both orders.

        Raises:
            EmulatedKernelFault: it did what it must not, or the orders left different bits.
        """
        if kernel not in self._entries:
            self.prepare([kernel])
        tensors = list({id(value): value for value in arguments if isinstance(value, Tensor)}.values())
        spans = [_span(tensor) for tensor in tensors]
        before = [_bytes(tensor).clone() for tensor in tensors]
        self._run(kernel, geometry, arguments, spans, is_reversed=True)
        reversed_results = [_bytes(tensor).clone() for tensor in tensors]
        for tensor, content in zip(tensors, before, strict=True):
            _bytes(tensor).copy_(content)
        self._run(kernel, geometry, arguments, spans, is_reversed=False)
        for index, (tensor, other) in enumerate(zip(tensors, reversed_results, strict=True)):
            if not torch.equal(_bytes(tensor), other):
                raise EmulatedKernelFault(
                    f"{kernel.name}: buffer {index} depends on the order of blocks and threads"
                )

    def _run(
        self,
        kernel: Kernel,
        geometry: Geometry,
        arguments: Sequence[Argument],
        spans: Sequence[tuple[int, int]],
        *,
        is_reversed: bool,
    ) -> None:
        library, entry = self._entries[kernel]
        packed = PackedArguments(arguments)
        bounds = (ctypes.c_void_p * (2 * len(spans) + 1))(*(address for span in spans for address in span))
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        failed = library.emulator_launch(
            entry,
            packed.pointers,
            (ctypes.c_uint * 3)(*geometry.grid),
            ctypes.c_uint(geometry.threads),
            ctypes.c_size_t(geometry.shared_bytes),
            bounds,
            ctypes.c_int(len(spans)),
            ctypes.c_int(is_reversed),
            message,
            ctypes.c_size_t(_MESSAGE_BYTES),
        )
        if failed:
            raise EmulatedKernelFault(f"{kernel.name}, {message.value.decode()}")

    def _runtime(self) -> list[Path]:
        """The emulator's own object files, compiled when they are missing."""
        digest = _digest(_EMULATOR.iterdir())
        objects = [self._build / f"{name}-{digest}.o" for name in _RUNTIME]
        for name, target in zip(_RUNTIME, objects, strict=True):
            if not target.exists():
                _build(["-O2", "-c", str(_EMULATOR / f"{name}.cc")], target)
        return objects

    def _compile(
        self, kernels: Sequence[Kernel], runtime: Sequence[Path]
    ) -> dict[Kernel, tuple[ctypes.CDLL, ctypes.c_void_p]]:
        source = kernels[0].source
        lines = [f'#include "{source}.cu"']
        lines += [
            f'extern "C" void emulator_entry_{index}(void** arguments) '
            f"{{ emulator::call(&{kernel.name}, arguments); }}"
            for index, kernel in enumerate(kernels)
        ]
        text = "\n".join(lines) + "\n"
        inputs = {*_EMULATOR.iterdir(), *SOURCES.iterdir(), *self._sources.iterdir()}
        digest = _digest(sorted(inputs), text)
        library = self._build / f"{source}-{digest}.so"
        if not library.exists():
            wrapper = self._build / f"{source}-{digest}.cc"
            wrapper.parent.mkdir(parents=True, exist_ok=True)
            partial = wrapper.with_suffix(f".{os.getpid()}.cc")
            partial.write_text(text, encoding="utf-8")
            partial.replace(wrapper)  # another process may compile it at this moment
            includes = [f"-I{folder}" for folder in (self._sources, SOURCES, _EMULATOR)]
            compiled = self._build / f"{source}-{digest}.o"
            _build([*_KERNEL_OPTIONS, *includes, "-c", str(wrapper)], compiled)
            _build(["-shared", "-Wl,-Bsymbolic", str(compiled), *map(str, runtime)], library)
        loaded = ctypes.CDLL(str(library))
        return {
            kernel: (loaded, ctypes.cast(loaded[f"emulator_entry_{index}"], ctypes.c_void_p))
            for index, kernel in enumerate(kernels)
        }


def _build(options: Sequence[str], target: Path) -> None:
    """Compile into a file that appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    done = subprocess.run(
        ["g++", *_OPTIONS, *options, "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EmulatorUnavailable(f"g++ does not take {target.stem}:\n{done.stderr}")
    partial.replace(target)


def _digest(files: Iterable[Path], text: str = "") -> str:
    hasher = hashlib.sha256(repr((_OPTIONS, _KERNEL_OPTIONS, text)).encode())
    for path in sorted(files):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one past its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    """All of the storage behind a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
