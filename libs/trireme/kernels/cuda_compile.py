"""Compile kernels for one GPU architecture, on first use, and keep what was compiled on disk.

NVRTC compiles where its Python bindings are installed, else nvcc does. Sources ship with the package and
include nothing of CUDA's, so neither needs more than itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trireme.errors import Kind, TriremeError
from trireme.kernels.cuda_cubin import function_sizes
from trireme.kernels.cuda_launch import SOURCES, Kernel

LOWEST_CAPABILITY: Final = (8, 0)
"""cp.async, and mma with bfloat16, begin here."""
_WGMMA_CAPABILITY: Final = (9, 0)
_STANDARD: Final = "-std=c++17"


class UnsupportedGpu(TriremeError):
    """The GPU is older than what the kernels are written for."""

    kind = Kind.INVALID
    code = "unsupported_gpu"


class CompilationFailed(TriremeError):
    """A kernel did not compile, or nothing is there to compile it; the message ends with the compiler's."""

    kind = Kind.UNAVAILABLE
    code = "kernel_compilation_failed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cubin:
    """A kernel's machine code."""

    image: bytes
    """ELF, as the driver loads it."""
    symbol: str
    """The kernel's name in it."""


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: (9, 0) is `sm_90a`.

    Raises:
        UnsupportedGpu: compute capability below 8.0.
    """
    major, minor = capability
    if capability < LOWEST_CAPABILITY:
        raise UnsupportedGpu(
            f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
        )
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def has_wgmma(capability: tuple[int, int]) -> bool:
    """Whether a GPU runs kernels named `sm90_...`: newer ones have no wgmma any more."""
    return capability == _WGMMA_CAPABILITY


def default_cache() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/trireme/cuda`, else under `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "trireme" / "cuda"


Compiler = Callable[[Kernel, str], bytes]
"""From a kernel and a target to a cubin."""


class CubinCache:
    """Kernels compiled for one architecture, each once for one text of sources and options.

    Args:
        directory: where they are kept, shared by processes and versions.
        target: `sm_80`, `sm_90a`, ...
        compiler: what compiles; None: NVRTC, or else nvcc.
    """

    __slots__ = ("_compiler", "_directory", "_target")

    def __init__(self, directory: Path, target: str, compiler: Compiler | None = None) -> None:
        self._directory = directory
        self._target = target
        self._compiler = compiler

    def get(self, kernel: Kernel) -> Cubin:
        """A kernel, compiled if it is not there yet.

        Raises:
            CompilationFailed: it does not compile, or there is no compiler.
        """
        path = self._directory / f"{kernel.source}-{self._target}-{_digest(kernel)}.cubin"
        found = _read(path, kernel)
        if found is not None:
            return found
        compiler = self._compiler or available_compiler()
        image = compiler(kernel, self._target)
        _write(path, image)
        return Cubin(image=image, symbol=symbol_of(kernel, image))


def available_compiler() -> Compiler:
    """NVRTC where `cuda-bindings` is installed, else nvcc.

    Raises:
        CompilationFailed: neither is there.
    """
    if has_nvrtc():
        return compile_with_nvrtc
    if shutil.which("nvcc"):
        return compile_with_nvcc
    raise CompilationFailed(
        "no compiler for CUDA is there; install cuda-bindings (pip install trireme[nvidia])"
    )


def has_nvrtc() -> bool:
    """Whether NVRTC's Python bindings are installed."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def compile_with_nvcc(kernel: Kernel, target: str) -> bytes:
    """A cubin with the kernel, by the nvcc that is on the path.

    Raises:
        CompilationFailed: it does not compile; with nvcc's messages.
    """
    with tempfile.TemporaryDirectory(prefix="trireme-cuda-") as folder:
        wrapper, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        wrapper.write_text(instantiating_text([kernel]), encoding="utf-8")
        command = ["nvcc", _STANDARD, f"-arch={target}", "-cubin", f"-I{SOURCES}"]
        done = subprocess.run(
            [*command, "-o", str(cubin), str(wrapper)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CompilationFailed(
                f"nvcc does not take {kernel.name} for {target}:\n{done.stdout}{done.stderr}"
            )
        return cubin.read_bytes()


def instantiating_text(kernels: list[Kernel]) -> str:
    """A translation unit of one source with just these of its templates' instantiations."""
    lines = [f'#include "{kernels[0].source}.cu"']
    lines += [
        f"template __global__ decltype({kernel.name}) {kernel.name};"
        for kernel in kernels
        if "<" in kernel.name
    ]
    return "\n".join(lines) + "\n"


def compile_with_nvrtc(kernel: Kernel, target: str) -> bytes:
    """A cubin with the kernel, by NVRTC.

    Raises:
        CompilationFailed: it does not compile; with NVRTC's messages.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    text = f'#include "{kernel.source}.cu"\n'
    with _program(nvrtc, text, f"{kernel.source}-instantiated.cu") as program:
        _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, kernel.name.encode()))
        options = [option.encode() for option in (_STANDARD, f"-arch={target}", f"-I{SOURCES}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            # The bindings write into bytes that they are given.
            log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            message = log.rstrip(b"\0").decode()
            raise CompilationFailed(f"NVRTC does not take {kernel.name} for {target}:\n{message}")
        image: bytes = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        return image


def symbol_of(kernel: Kernel, image: bytes) -> str:
    """A kernel's mangled name in a cubin that has one instantiation of it.

    Raises:
        CompilationFailed: the cubin has none, or several.
    """
    base = kernel.name.split("<")[0]
    found = [symbol for symbol in function_sizes(image) if symbol.startswith(f"_Z{len(base)}{base}")]
    if len(found) != 1:
        raise CompilationFailed(f"a cubin has {len(found)} kernels {base}; one was asked for: {kernel.name}")
    return found[0]


@contextlib.contextmanager
def _program(nvrtc: Any, text: str, name: str) -> Iterator[Any]:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """What a call of NVRTC returns beside its status."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilationFailed(f"NVRTC failed: {status}")
    return values[0] if values else None


def _digest(kernel: Kernel) -> str:
    hasher = hashlib.sha256(f"{_STANDARD} {kernel.name}".encode())
    for path in sorted(SOURCES.iterdir()):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:24]


def _read(path: Path, kernel: Kernel) -> Cubin | None:
    """What is kept, or None: nothing, or not what was written."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, image = kept[:32], kept[32:]
    if hashlib.sha256(image).digest() != digest:
        return None
    return Cubin(image=image, symbol=symbol_of(kernel, image))


def _write(path: Path, image: bytes) -> None:
    """The file appears when it is complete; whoever comes second replaces it with the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(image).digest() + image)
    Path(partial).replace(path)
