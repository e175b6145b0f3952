"""The checks that open `make bench-gpu` pass in the emulator, and notice a kernel that is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.gpu_checks import EXPERT_FORMATS, FORMATS, SMALL, check
from benchmarks.gpu_decode import check_choices
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_experts import expert_kernel
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel
from trireme.kernels.cuda_linear import gemm_kernel
from trireme.quant.formats import weight_format

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    types = ("f16", "bf16")
    emulator.prepare(gemm_kernel(kind, weight_format(name), 8) for kind in types for name in FORMATS)
    emulator.prepare(
        expert_kernel(kind, weight_format(name) if name else None, 8)
        for kind in types
        for name in EXPERT_FORMATS
    )


class Forgetful:
    """A launcher that does not run some kernels."""

    multiprocessors = 4

    def __init__(self, emulator: Emulator, forgotten: Sequence[str]) -> None:
        self._emulator = emulator
        self._forgotten = forgotten

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        if kernel.source not in self._forgotten:
            self._emulator.launch(kernel, geometry, arguments)


def test_all_kernels_are_right(emulator: Emulator) -> None:
    checks = check(emulator, CPU, SMALL)
    assert len(checks) > 20
    assert not [result for result in checks if not result.error < 1.0]


def test_the_check_of_the_engines_choices_passes_and_notices_a_kernel_that_does_nothing(
    emulator: Emulator,
) -> None:
    (found,) = check_choices(emulator, CPU, vocab=SMALL.vocab)
    assert found.error < 1.0
    (found,) = check_choices(Forgetful(emulator, ("adjust_logits",)), CPU, vocab=SMALL.vocab)
    assert found.error >= 1.0


def test_kernels_that_do_nothing_are_noticed(emulator: Emulator) -> None:
    checks = check(Forgetful(emulator, ("low_bit_gemm", "expert_gemm", "host_gemv")), CPU, SMALL)
    wrong = [result.name for result in checks if not result.error < 1.0]
    for name in ("int8_ch", "mixture in", "host product"):
        assert any(each.startswith(name) for each in wrong), name
