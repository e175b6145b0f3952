"""The emulator's wgmma multiplies as matrices do, and finds what a GPU would punish."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import BUILD, TYPES
from trireme.kernels.cuda_emulator import EmulatedKernelFault, Emulator
from trireme.kernels.cuda_launch import Geometry, Kernel

MISTAKES = {
    "no_proxy_fence": "wgmma read what it must not: shared byte .* was written, with no proxy fence since",
    "no_barrier": "wgmma read what it must not: shared byte .* was (never )?written",
    "no_fence": "issues a wgmma before any wgmma.fence",
    "fence_before_writing": r"has written a register of A with no wgmma\.fence since",
    "absent_warp": r"thread (9[6-9]|1\d\d) waits at warpgroup.cu:\d+ while thread \d+ waits for it",
    "other_descriptor": "thread 77 issues another wgmma than the first of its warpgroup",
    "plain_layout": "descriptor names a layout other than the swizzle of 128 bytes",
    "misplaced": "descriptor leaves its row of 128 bytes",
    "reads_sums": "touches an accumulator of a wgmma that it has not waited for",
    "waits_for_too_few": "touches an accumulator of a wgmma that it has not waited for",
    "changes_weights": "changes a register of A of a wgmma that it has not waited for",
    "changes_tokens": "shared byte .* is still being read by a wgmma",
    "leaves": "leaves the kernel with a wgmma that it has not waited for",
}


def multiplying(kind: str, tokens: int, mistake: str) -> Kernel:
    return Kernel(source="warpgroup", name=f"warpgroup_multiply<{kind}, {tokens}, {mistake}>")


@pytest.fixture(scope="module")
def emulator(emulator: Emulator) -> Emulator:
    emulator = Emulator(BUILD, sources=Path(__file__).parent / "kernels")
    emulator.prepare(multiplying(kind, tokens, "none") for kind in TYPES for tokens in (64, 128))
    emulator.prepare(multiplying("f16", 64, mistake) for mistake in MISTAKES)
    return emulator


def run(emulator: Emulator, kernel: Kernel, a: Tensor, b: Tensor, *, threads: int = 128) -> Tensor:
    out = torch.full((64, len(b)), torch.nan)
    geometry = Geometry(grid=(1, 1, 1), threads=threads, shared_bytes=128 * len(b))
    emulator.launch(kernel, geometry, [a, b, out])
    return out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [64, 128])
def test_a_warpgroup_multiplies_as_matrices_do(emulator: Emulator, kind: str, tokens: int) -> None:
    a, b = torch.randn(64, 64, dtype=TYPES[kind]), torch.randn(tokens, 64, dtype=TYPES[kind])
    expected = torch.zeros(64, tokens)
    for columns in torch.arange(64).split(16):
        expected = (expected.double() + a[:, columns].double() @ b[:, columns].double().t()).float()
    assert torch.equal(run(emulator, multiplying(kind, tokens, "none"), a, b), expected)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(emulator: Emulator, mistake: str) -> None:
    a, b = torch.randn(2, 64, 64).half()
    with pytest.raises(EmulatedKernelFault, match=MISTAKES[mistake]):
        run(emulator, multiplying("f16", 64, mistake), a, b)


def test_three_warps_are_no_warpgroup(emulator: Emulator) -> None:
    a, b = torch.randn(2, 64, 64).half()
    with pytest.raises(EmulatedKernelFault, match="a warpgroup has 128 threads, not 96"):
        run(emulator, multiplying("f16", 64, "none"), a, b, threads=96)
