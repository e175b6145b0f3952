"""One emulator for all tests of kernels: what is compiled once is kept for the next run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trireme.kernels import cuda_emulator
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
BUILD = Path(__file__).resolve().parents[2] / "build" / "emulator"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not cuda_emulator.is_available():
        pytest.skip("the CUDA emulator needs g++ on x86-64")
    return Emulator(BUILD)


class Hopper:
    """The emulator as a GPU of compute capability 9.0, with what it has compiled."""

    has_wgmma = True

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.multiprocessors = emulator.multiprocessors

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        self._emulator.launch(kernel, geometry, arguments)


@pytest.fixture(scope="session")
def hopper(emulator: Emulator) -> Hopper:
    return Hopper(emulator)


def assert_rounded(actual: Tensor, exact: Tensor, *, slack: float = 0.05) -> None:
    """`actual` is `exact` (float64) rounded once to its own type.

    Args:
        slack: what the float32 arithmetic before the rounding may add, in steps of `actual`'s type at the
            value's size; a step is never below that at a thousandth of the largest value.
    """
    finfo = torch.finfo(actual.dtype)
    size = exact.abs().clamp(min=float(exact.abs().max()) * 1e-3, max=None)
    step = 2.0 ** size.log2().floor() * finfo.eps
    wrong = (actual.double() - exact).abs() / step.clamp(min=finfo.tiny * finfo.eps)
    assert actual.shape == exact.shape
    assert float(wrong.max()) <= 0.5 + slack, f"off by {float(wrong.max())} steps"
