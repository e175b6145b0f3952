"""The emulator finds what is wrong with a kernel, and says nothing where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.conftest import BUILD, TYPES
from trireme.kernels.cuda_emulator import EmulatedKernelFault, Emulator, EmulatorUnavailable
from trireme.kernels.cuda_launch import Geometry, Kernel

KERNELS = Path(__file__).parent / "kernels"

RIGHT = (
    "neighbours<2, 1>",
    "neighbours<1, 1>",
    "neighbours<0, 0>",
    "refilled<true>",
    "shuffles<99>",
    "leaves<false>",
    "passes_on<true>",
)
WRONG = {
    "neighbours<0, 1>": "thread .* reads what it must not: shared byte .* was",
    "neighbours<0, 32>": "thread .* reads what it must not: shared byte .* was",
    "neighbours<1, 32>": "thread .* reads what it must not: shared byte .* was",
    "refilled<false>": "reads what it must not: shared byte .* was written, with no barrier since, by thread",
    "overtaken": "writes what it must not: shared byte .* was read, with no barrier since, by thread",
    "shuffles<5>": "thread 5 has left the kernel while thread .* waits for it at faults.cu:",
    "leaves<true>": "thread 40 has left the kernel while thread .* waits for it at faults.cu:",
    "beyond<1>": "thread .* writes 4 bytes out of bounds, byte 256 of buffer 0 with 256",
    "beyond<-1>": "thread .* writes 4 bytes out of bounds, byte -4 of buffer 0",
    "misaligned": "thread .* writes 8 bytes at an address that is no multiple of that",
    "passes_on<false>": "reads what it must not: byte .* was written by thread .* with no barrier since",
    "unwritten": "thread .* reads what it must not: shared byte .* was never written",
    "last_wins": "buffer 0 depends on the order of blocks and threads",
}
HANDOVERS = ("handovers<0>", "handovers<1>", "handovers<2>")
COPIES = ("copies<0>", "copies<1>", "copies<2>")
ARITHMETIC = [
    Kernel(source="arithmetic", name=f"{name}<{argument}>")
    for name, arguments in {
        "multiply": ("f16, false", "f16, true", "bf16, false", "bf16, true"),
        "convert": ("f16", "bf16"),
        "multiply_add": ("f16", "bf16"),
    }.items()
    for argument in arguments
]


def fault(name: str) -> Kernel:
    return Kernel(source="faults", name=name)


@pytest.fixture(scope="module")
def emulator(emulator: Emulator) -> Emulator:
    emulator = Emulator(BUILD, sources=KERNELS)
    emulator.prepare([*map(fault, (*RIGHT, *WRONG, *COPIES, *HANDOVERS, "beyond<0>", "counts")), *ARITHMETIC])
    return emulator


def run(emulator: Emulator, name: str, *tensors: torch.Tensor, threads: int = 64, blocks: int = 1) -> None:
    geometry = Geometry(grid=(blocks, 1, 1), threads=threads, shared_bytes=1024)
    emulator.launch(fault(name), geometry, tensors)


@pytest.mark.parametrize("name", [*RIGHT, "beyond<0>"])
def test_a_right_kernel_runs(emulator: Emulator, name: str) -> None:
    out = torch.full((64,), torch.nan)
    run(emulator, name, out)
    assert not out.isnan().any()


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found_and_named(emulator: Emulator, name: str) -> None:
    with pytest.raises(EmulatedKernelFault, match=WRONG[name]):
        run(emulator, name, torch.full((64,), torch.nan), blocks=2)


def test_an_asynchronous_copy_lands_at_its_wait(emulator: Emulator) -> None:
    given, out = torch.randn(256), torch.full((256,), torch.nan)
    run(emulator, "copies<0>", given, out, threads=32)
    assert torch.equal(out, torch.cat((given[:128], torch.zeros(128))))  # what is not valid comes as zeros
    with pytest.raises(EmulatedKernelFault, match="has not waited for"):
        run(emulator, "copies<1>", given, out, threads=32)
    with pytest.raises(EmulatedKernelFault, match=r"is still being copied by cp\.async of thread"):
        run(emulator, "copies<2>", given, out, threads=32)


def test_a_block_reads_what_another_has_handed_over(emulator: Emulator) -> None:
    parts, out, counter = torch.zeros(3 * 64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    run(emulator, "handovers<2>", parts, out, counter, blocks=3)
    assert torch.equal(out, torch.full((64,), 3.0))
    for name in ("handovers<0>", "handovers<1>"):
        counter.zero_()
        with pytest.raises(
            EmulatedKernelFault, match=r"of block \d, which has not handed it over|no barrier"
        ):
            run(emulator, name, parts, out, counter, blocks=3)


def test_atomics_and_ballots_count_every_thread(emulator: Emulator) -> None:
    out = torch.zeros(3, dtype=torch.int32)
    run(emulator, "counts", out, threads=64, blocks=3)
    assert out.tolist()[:2] == [3 * sum(range(0, 64, 2)), 3 * sum(range(1, 64, 2))]
    assert out[2].item() & 0xFFFFFFFF == sum(1 << lane for lane in range(0, 32, 3))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fragments_multiply_as_matrices_do(emulator: Emulator, name: str, transposed: bool) -> None:
    a, b = torch.randn(16, 16, dtype=TYPES[name]), torch.randn(8, 16, dtype=TYPES[name])
    c = torch.randn(16, 8)
    expected = (c.double() + a.double() @ b.double().t()).float()
    given_b = b.t().contiguous() if transposed else b
    kernel = Kernel(source="arithmetic", name=f"multiply<{name}, {str(transposed).lower()}>")
    emulator.launch(kernel, Geometry(grid=(1, 1, 1), threads=32, shared_bytes=1024), [a, given_b, c])
    assert torch.equal(c, expected)


@pytest.mark.parametrize("name", TYPES)
def test_numbers_round_as_torch_rounds_them(emulator: Emulator, name: str) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TYPES[name]).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:].double() + every[:-1].double()) / 2
    near = [between.float(), torch.nextafter(between.float(), torch.tensor(torch.inf))]
    values = torch.cat((every, *near, torch.tensor([torch.inf, -torch.inf, 1e-30, 3e38])))
    out, back = torch.empty(len(values), dtype=TYPES[name]), torch.empty(len(values))
    kernel = Kernel(source="arithmetic", name=f"convert<{name}>")
    geometry = Geometry(grid=(4, 1, 1), threads=256)
    emulator.launch(kernel, geometry, [values, out, back, np.int32(len(values))])
    assert torch.equal(out.view(torch.int16), values.to(TYPES[name]).view(torch.int16))
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("name", TYPES)
def test_a_fused_multiply_add_rounds_once(emulator: Emulator, name: str) -> None:
    a, b, c = (torch.randn(512, dtype=TYPES[name]) for _ in range(3))
    out = torch.empty(512, dtype=TYPES[name])
    words = [tensor.view(torch.int32) for tensor in (a, b, c, out)]
    kernel = Kernel(source="arithmetic", name=f"multiply_add<{name}>")
    emulator.launch(kernel, Geometry(grid=(1, 1, 1), threads=256), words)
    assert torch.equal(out, (a.double() * b.double() + c.double()).to(TYPES[name]))


def test_a_kernel_that_does_not_compile_is_refused_with_the_compilers_words(emulator: Emulator) -> None:
    with pytest.raises(EmulatorUnavailable, match="no_such_kernel"):
        emulator.prepare([fault("no_such_kernel")])
