"""Install llama-cpp-python in an environment of its own; without AMX where its AMX code crashes.

    python3.11 -m benchmarks.cpu_models.llama_cpp_install

It is compiled here, for this CPU, which takes minutes. A probe then computes with a small model of each type;
where that dies on a CPU with AMX, llama.cpp is built again for all instruction sets but AMX. `.built` in the
environment says which of them it was, and the benchmark repeats it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = REPOSITORY / ".tools" / "llama_cpp"
BUILT = ENVIRONMENT / ".built"
_PINNED = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
_BASE = "-DLLAVA_BUILD=OFF"
_INSTRUCTION_SETS = {
    "avx512f": "GGML_AVX512",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_vbmi": "GGML_AVX512_VBMI",
    "avx512_bf16": "GGML_AVX512_BF16",
}
"""Flags of /proc/cpuinfo, and what a build that is not for the CPU at hand has to be told, beyond AVX2."""


def without_amx(flags: set[str]) -> str:
    """Options of a build for a CPU with these flags, less AMX."""
    on = [f"-D{option}=ON" for flag, option in _INSTRUCTION_SETS.items() if flag in flags]
    return " ".join(["-DGGML_NATIVE=OFF", *on])


def cpu_flags() -> set[str]:
    """The CPU's, as /proc/cpuinfo has them."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def install(cmake_options: str) -> None:
    """Build and install; replaces what is there."""
    pip, constraints = str(ENVIRONMENT / "bin" / "pip"), str(REPOSITORY / "constraints.txt")
    environ = {**os.environ, "CMAKE_ARGS": f"{_BASE} {cmake_options}".strip()}
    again = ["--force-reinstall", "--no-deps", "--no-cache-dir"] if cmake_options else []
    subprocess.run([pip, "install", "--quiet", "-c", constraints, *again, *_PINNED], env=environ, check=True)


def probe() -> int:
    """Exit status of computing with small models; negative: the signal that ended it."""
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "benchmarks.cpu_models.llama_cpp_probe"]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def main() -> None:
    if not (ENVIRONMENT / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    flags = cpu_flags()
    install("")
    outcome = probe()
    amx = "built with AMX" if "amx_int8" in flags else "no AMX on this CPU"
    if outcome < 0 and "amx_int8" in flags:
        print(f"llama.cpp died of signal {-outcome} with AMX; building it without")
        amx = f"built without AMX, with which it died of signal {-outcome}"
        install(without_amx(flags))
        outcome = probe()
    if outcome:
        raise SystemExit(f"llama.cpp does not compute here: its probe ended with {outcome}")
    BUILT.write_text(json.dumps({"amx": amx}) + "\n", encoding="utf-8")
    print(f"llama-cpp-python is installed: {amx}")


if __name__ == "__main__":
    main()
