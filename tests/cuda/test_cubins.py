"""Every kernel compiles for every architecture that it is for, within its budget and without spills.

Registers decide how many blocks a multiprocessor holds, instructions how long a memory-bound kernel keeps up
with its memory; both grow unseen. A budget is what nvcc 13.0 gives, plus a tenth.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from trireme.kernels.cuda_attention import attention_kernel, merge_kernel
from trireme.kernels.cuda_compile import (
    CompilationFailed,
    CubinCache,
    UnsupportedGpu,
    architecture,
    compile_with_nvcc,
    compile_with_nvrtc,
    has_nvrtc,
    has_wgmma,
    instantiating_text,
    symbol_of,
)
from trireme.kernels.cuda_cubin import INSTRUCTION_BYTES, InvalidCubin, function_sizes
from trireme.kernels.cuda_experts import (
    GROUP_BY_EXPERT,
    choosing_kernel,
    combining_kernel,
    expert_kernel,
)
from trireme.kernels.cuda_host_memory import GATHER_ROWS, gemv_kernel
from trireme.kernels.cuda_launch import SOURCES, Kernel
from trireme.kernels.cuda_linear import gemm_kernel, wgmma_kernel
from trireme.kernels.cuda_sampling import (
    BIAS_LOGITS,
    FORBID_LOGITS,
    PENALISE_LOGITS,
    SAMPLE,
    VERIFY_DRAFTS,
)
from trireme.quant.formats import weight_format

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
pytestmark = pytest.mark.timeout(600)  # a busy machine may take minutes to compile all of them
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@dataclass(frozen=True, slots=True)
class Budget:
    """The most of all architectures that the kernel is for."""

    registers: int
    instructions: int
    stack_bytes: int = 0


def gemm(name: str, tile: int, kind: str = "bf16") -> Kernel:
    return gemm_kernel(kind, weight_format(name), tile)


def wgmma(name: str, tile: int, kind: str = "bf16") -> Kernel:
    return wgmma_kernel(kind, weight_format(name), tile)


def architectures_of(kernel: Kernel) -> tuple[str, ...]:
    """A kernel for one architecture says so in its name."""
    return ("sm_90a",) if kernel.source.startswith("sm90_") else ARCHITECTURES


BUDGETS = {
    Kernel(source="rms_norm", name="rms_norm<bf16, 1>"): Budget(44, 600),
    Kernel(source="rms_norm", name="rms_norm<bf16, 8>"): Budget(44, 600),
    Kernel(source="rotary_append_kv", name="rotary_append_kv<bf16>"): Budget(64, 500),
    Kernel(source="append_kv", name="append_kv<bf16>"): Budget(46, 350),
    Kernel(source="swiglu", name="swiglu<bf16>"): Budget(36, 500),
    Kernel(source="copy_blocks", name="copy_blocks"): Budget(28, 100),
    Kernel(source="append_coded_kv", name="append_coded_kv<bf16, Int8Code>"): Budget(48, 1650),
    Kernel(source="append_coded_kv", name="append_coded_kv<bf16, Fp8Code>"): Budget(48, 1400),
    attention_kernel("bf16", 128, 1): Budget(192, 4050),
    attention_kernel("bf16", 128, 1, "Int8Code"): Budget(192, 4100),
    attention_kernel("bf16", 128, 4): Budget(224, 7850),
    merge_kernel("bf16", 128): Budget(48, 1050),
    gemm("fp6_e3m2", 8, "f16"): Budget(63, 1950),
    gemm("fp6_e3m2", 32): Budget(144, 2100),
    gemm("fp6_e2m3", 8): Budget(60, 2130),
    gemm("fp5_e2m2", 8): Budget(60, 1970),
    expert_kernel("bf16", None, 8): Budget(62, 860),
    expert_kernel("bf16", None, 32): Budget(145, 1215),
    expert_kernel("bf16", weight_format("fp6_e3m2"), 8): Budget(62, 1440),
    expert_kernel("bf16", weight_format("int4_g32"), 32): Budget(201, 1770),
    choosing_kernel("bf16", 128): Budget(37, 950),
    choosing_kernel("bf16", 512): Budget(53, 1065),
    GROUP_BY_EXPERT: Budget(36, 1160),
    combining_kernel("bf16"): Budget(42, 335),
    GATHER_ROWS: Budget(33, 240),
    gemv_kernel("bf16", 1): Budget(40, 265),
    gemv_kernel("bf16", 8): Budget(70, 1410),
    gemm("int8_ch", 8): Budget(64, 2000),
    gemm("int4_g32", 32): Budget(208, 2400),
    gemm("int4_g128", 8): Budget(88, 2000),
    wgmma("fp6_e3m2", 64): Budget(113, 1990),
    wgmma("fp6_e3m2", 128): Budget(168, 2470),
    wgmma("fp6_e3m2", 128, "f16"): Budget(168, 2390),
    wgmma("fp6_e2m3", 128): Budget(168, 2450),
    wgmma("fp5_e2m2", 128): Budget(168, 2420),
    wgmma("int8_ch", 128): Budget(168, 2360),
    wgmma("int4_g32", 64): Budget(153, 2050),
    wgmma("int4_g128", 64): Budget(148, 1980),
    SAMPLE: Budget(48, 2150),
    VERIFY_DRAFTS: Budget(34, 250),
    BIAS_LOGITS: Budget(24, 100),
    PENALISE_LOGITS: Budget(44, 650),
    FORBID_LOGITS: Budget(20, 160),
}


@dataclass(frozen=True, slots=True)
class Used:
    registers: int
    instructions: int
    stack_bytes: int
    spill_bytes: int


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes "
    r"spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_all(target: str, folder: Path) -> dict[str, Used]:
    """What each kernel uses, by mangled name; one run of nvcc for all of them."""
    by_source: dict[str, list[Kernel]] = {}
    for kernel in BUDGETS:
        if target in architectures_of(kernel):
            by_source.setdefault(kernel.source, []).append(kernel)
    wrapper, cubin = folder / f"{target}.cu", folder / f"{target}.cubin"
    wrapper.write_text("".join(map(instantiating_text, by_source.values())), encoding="utf-8")
    command = ["nvcc", "-std=c++17", f"-arch={target}", "-cubin", "-Xptxas", "-v", f"-I{SOURCES}"]
    command += ["--keep", "--keep-dir", str(folder)]
    done = subprocess.run(
        [*command, "-o", str(cubin), str(wrapper)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    # ptxas tells of wgmmas that it serializes, or waits for where the kernel does not.
    assert "gmma" not in done.stderr.lower(), done.stderr
    sizes = function_sizes(cubin.read_bytes())
    return {
        found["symbol"]: Used(
            registers=int(found["registers"]),
            instructions=sizes[found["symbol"]] // INSTRUCTION_BYTES,
            stack_bytes=int(found["stack"]),
            spill_bytes=int(found["stores"]) + int(found["loads"]),
        )
        for found in _FUNCTION.finditer(done.stderr)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def used(folder: Path) -> dict[str, dict[str, Used]]:
    """By architecture and mangled name."""
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda target: compile_all(target, folder), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, results, strict=True))


def mangled_prefix(kernel: Kernel) -> str:
    """How a kernel's mangled name begins: `rms_norm<bf16, 8>` is `_Z8rms_normI4bf16Li8EE`."""
    base, _, rest = kernel.name.partition("<")
    prefix = f"_Z{len(base)}{base}"
    if not rest:
        return prefix
    arguments = []
    for argument in rest.removesuffix(">").split(", "):
        name, _, inner = argument.partition("<")
        if name.isdigit():
            arguments.append(f"Li{name}E")
        elif arguments and arguments[0] == f"{len(name)}{name}":
            arguments.append("S0_")
        else:
            arguments.append(f"{len(name)}{name}" + ("IS0_E" if inner else ""))
    return f"{prefix}I{''.join(arguments)}E"


def use_of(kernel: Kernel, symbols: dict[str, Used]) -> Used:
    found = [use for symbol, use in symbols.items() if symbol.startswith(mangled_prefix(kernel))]
    assert len(found) == 1, (kernel.name, list(symbols))
    return found[0]


def test_every_kernel_has_a_budget() -> None:
    assert {kernel.source for kernel in BUDGETS} == {path.stem for path in SOURCES.glob("*.cu")}


@needs_nvcc
@pytest.mark.parametrize(
    "kernel, target",
    [(kernel, target) for kernel in BUDGETS for target in architectures_of(kernel)],
    ids=lambda value: value.name if isinstance(value, Kernel) else value,
)
def test_a_kernel_keeps_its_budget(used: dict[str, dict[str, Used]], kernel: Kernel, target: str) -> None:
    use, budget = use_of(kernel, used[target]), BUDGETS[kernel]
    assert use.spill_bytes == 0
    assert use.stack_bytes <= budget.stack_bytes
    assert use.registers <= budget.registers
    assert use.instructions <= budget.instructions


@needs_nvcc
def test_wgmma_is_what_its_kernels_multiply_with_and_no_others(
    used: dict[str, dict[str, Used]], folder: Path
) -> None:
    functions = (folder / "sm_90a.ptx").read_text(encoding="utf-8").split(".visible .entry ")[1:]
    by_symbol = {text.split("(")[0]: text for text in functions}
    assert set(by_symbol) == set(used["sm_90a"])
    for kernel in BUDGETS:
        (text,) = (text for symbol, text in by_symbol.items() if symbol.startswith(mangled_prefix(kernel)))
        if kernel.source.startswith("sm90_"):
            tile = kernel.name.removesuffix(">").split(", ")[-1]
            # One of each slice of 16 columns, in a loop over tiles of 64.
            assert text.count(f"wgmma.mma_async.sync.aligned.m64n{tile}k16.f32") == 4
            assert "mma.sync" not in text
        else:
            assert "wgmma" not in text


@needs_nvcc
def test_a_kernel_is_compiled_once_and_kept(tmp_path: Path) -> None:
    compiled: list[str] = []

    def compiler(kernel: Kernel, target: str) -> bytes:
        compiled.append(kernel.name)
        return compile_with_nvcc(kernel, target)

    kernel = Kernel(source="append_kv", name="append_kv<f16>")
    first = CubinCache(tmp_path, "sm_80", compiler).get(kernel)
    again = CubinCache(tmp_path, "sm_80", compiler).get(kernel)
    assert compiled == ["append_kv<f16>"]
    assert (again.image, again.symbol) == (first.image, first.symbol)
    assert first.symbol.startswith("_Z9append_kvI3f16E")
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])  # what was cut short is compiled again
    assert CubinCache(tmp_path, "sm_80", compiler).get(kernel).image == first.image
    CubinCache(tmp_path, "sm_89", compiler).get(kernel)
    CubinCache(tmp_path, "sm_80", compiler).get(Kernel(source="append_kv", name="append_kv<bf16>"))
    assert len(compiled) == 4


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_refused_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match="no_such_kernel"):
        CubinCache(tmp_path, "sm_80", compile_with_nvcc).get(
            Kernel(source="append_kv", name="no_such_kernel<f16>")
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not has_nvrtc(), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_nvrtc_takes_every_kernel(target: str) -> None:
    for kernel in (kernel for kernel in BUDGETS if target in architectures_of(kernel)):
        assert symbol_of(kernel, compile_with_nvrtc(kernel, target))
    with pytest.raises(CompilationFailed, match="no_such_kernel"):
        compile_with_nvrtc(Kernel(source="append_kv", name="no_such_kernel"), target)


def test_an_architecture_is_named_after_the_compute_capability() -> None:
    assert [architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))] == [
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_100a",
    ]
    assert [has_wgmma(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        False,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(UnsupportedGpu, match=r"compute capability 7\.5; the kernels need 8\.0"):
        architecture((7, 5))


@pytest.mark.parametrize(
    "image", [b"", b"\x7fELF\x02\x01", b"not an ELF file" * 10, b"\x7fELF\x02\x01" + bytes(58)]
)
def test_what_is_no_cubin_is_refused(image: bytes) -> None:
    with pytest.raises(InvalidCubin):
        function_sizes(image)
