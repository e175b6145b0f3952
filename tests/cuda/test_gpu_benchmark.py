"""The checks that open `make bench-gpu` pass in the emulator, and notice a kernel that is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.gpu import pays_from
from benchmarks.gpu_checks import EXPERT_FORMATS, FORMATS, SMALL, check
from benchmarks.gpu_decode import check_choices
from tests.cuda.conftest import Hopper
from tests.cuda.test_warpgroup_gemm import KERNELS as WGMMA_KERNELS
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_experts import expert_kernel
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel, Launcher
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
    emulator.prepare(WGMMA_KERNELS)


class Forgetful:
    """A launcher that does not run some kernels."""

    multiprocessors = 4

    def __init__(self, launcher: Launcher, forgotten: Sequence[str]) -> None:
        self._launcher = launcher
        self._forgotten = forgotten
        self.has_wgmma = launcher.has_wgmma

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        if kernel.source not in self._forgotten:
            self._launcher.launch(kernel, geometry, arguments)


def test_all_kernels_are_right(hopper: Hopper) -> None:
    checks = check(hopper, CPU, SMALL)
    assert len(checks) > 20
    assert not [result for result in checks if not result.error < 1.0]


def test_the_check_of_the_engines_choices_passes_and_notices_a_kernel_that_does_nothing(
    emulator: Emulator,
) -> None:
    (found,) = check_choices(emulator, CPU, vocab=SMALL.vocab)
    assert found.error < 1.0
    (found,) = check_choices(Forgetful(emulator, ("adjust_logits",)), CPU, vocab=SMALL.vocab)
    assert found.error >= 1.0


def test_kernels_that_do_nothing_are_noticed(hopper: Hopper) -> None:
    forgotten = ("low_bit_gemm", "sm90_low_bit_gemm", "expert_gemm", "host_gemv")
    checks = check(Forgetful(hopper, forgotten), CPU, SMALL)
    wrong = [result.name for result in checks if not result.error < 1.0]
    for name in ("int8_ch", "wgmma int8_ch", "mixture in", "host product"):
        assert any(each.startswith(name) for each in wrong), name


def test_wgmma_pays_from_where_it_is_never_slower() -> None:
    assert pays_from({16: 0.5, 64: 1.1, 128: 1.6}) == 64
    assert pays_from({16: 1.2, 64: 0.9, 128: 1.6}) == 128
    assert pays_from({16: 1.2, 64: 1.1}) == 16
    assert pays_from({16: 1.2, 64: 0.9}) is None
