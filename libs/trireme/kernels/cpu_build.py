"""Build the CPU kernels: `python -m trireme.kernels.cpu_build`.

One compiler run per file of `csrc/cpu`, each with the flags of its instruction set, and a library beside this
file whose name has a hash of sources and flags: one that was built from others is never loaded. Needs the
standard library alone, since it also runs while the package is being installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc" / "cpu"
DIRECTORY: Final = Path(__file__).parent
COMPILERS: Final = ("g++", "clang++", "c++")
"""Tried in this order where `CXX` names none."""

_FLAGS: Final = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w")
_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma")
_UNITS: Final[Mapping[str, Sequence[str]]] = {
    "library.cpp": (),
    "levels.cpp": (),
    "multiply.cpp": (),
    "thread_pool.cpp": (),
    "decoder_layers.cpp": (),
    "mixture.cpp": (),
    "decoder_kernels.cpp": ("-mavx2", "-mfma", "-mf16c", "-mtune=znver2"),
    "avx2.cpp": ("-mavx2", "-mfma", "-mtune=znver2"),
    "avx512.cpp": (*_AVX512, "-mtune=icelake-server"),
    "amx.cpp": _AVX512,
}
_AMX: Final = ("-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mtune=sapphirerapids")
"""Of amx.cpp, where the compiler and its assembler take them; without them the unit has no kernels."""
_AMX_PROBE: Final = 'int main() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }\n'
_INCLUDE: Final = re.compile(r'^#include "(.+)"', re.MULTILINE)


class BuildFailed(Exception):
    """The library cannot be built here; says why."""


def is_supported() -> bool:
    """Whether there are kernels for this kind of machine: x86-64 with Linux."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def source_files() -> tuple[Path, ...]:
    """What the library is built from: the units, and what they include."""
    names, found = list(_UNITS), dict.fromkeys(_UNITS)
    while names:
        text = (SOURCES / names.pop()).read_text(encoding="utf-8")
        new = [name for name in _INCLUDE.findall(text) if name not in found]
        names += new
        found |= dict.fromkeys(new)
    return tuple(SOURCES / name for name in sorted(found))


def library_path() -> Path:
    """Where the library of the present sources is, or would be."""
    digest = hashlib.sha256(repr((_FLAGS, _UNITS, _AMX)).encode())
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return DIRECTORY / f"libtrireme_cpu_{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Build the library unless it is there, and remove those of other sources.

    Raises:
        BuildFailed: there is no compiler, it fails, the directory cannot be written, or there are no kernels
            for this kind of machine.
    """
    target = library_path()
    if target.exists():
        return target
    if not is_supported():
        raise BuildFailed(f"there are no kernels for {platform.machine()} with {sys.platform}")
    try:
        with tempfile.TemporaryDirectory(prefix=".cpu_build_", dir=DIRECTORY) as scratch:
            built = _compile(compiler(), Path(scratch))
            built.replace(target)  # whole or not at all, for those who load it meanwhile
    except OSError as error:
        raise BuildFailed(f"{DIRECTORY} cannot be written: {error}") from error
    for other in DIRECTORY.glob("libtrireme_cpu_*.so"):
        if other != target:
            other.unlink(missing_ok=True)
    return target


def compiler() -> str:
    """The C++ compiler: what `CXX` names, or the first of `COMPILERS` that is there.

    Raises:
        BuildFailed: it is not there.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if shutil.which(name):
            return name
    raise BuildFailed(f"there is no C++ compiler ({named or ', '.join(COMPILERS)}); install one, or set CXX")


def _compile(compiler: str, scratch: Path) -> Path:
    units = dict(_UNITS)
    if _has_amx(compiler, scratch):
        units["amx.cpp"] = (*units["amx.cpp"], *_AMX)
    else:
        print(f"cpu_build: {compiler} has no AMX; CPUs that do take AVX-512", file=sys.stderr)
    objects = [scratch / f"{name}.o" for name in units]
    _run_all(
        [
            [compiler, *_FLAGS, *flags, "-c", str(SOURCES / name), "-o", str(out)]
            for (name, flags), out in zip(units.items(), objects, strict=True)
        ]
    )
    library = scratch / "library.so"
    _run_all([[compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]])
    return library


def _has_amx(compiler: str, scratch: Path) -> bool:
    probe = scratch / "amx_probe.cpp"
    probe.write_text(_AMX_PROBE, encoding="utf-8")
    command = [compiler, *_AMX, "-c", str(probe), "-o", str(scratch / "amx_probe.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise BuildFailed(f"{' '.join(command)} failed:\n{output[-4000:]}")


def main() -> None:
    try:
        path = build()
    except BuildFailed as error:
        raise SystemExit(f"cpu_build: {error}") from None
    print(f"cpu_build: {path.name} is ready")


if __name__ == "__main__":
    main()
