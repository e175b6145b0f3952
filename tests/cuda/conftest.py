"""One emulator for all tests of kernels: what is compiled once is kept for the next run."""

from __future__ import annotations

from pathlib import Path

import pytest

from trireme.kernels import cuda_emulator
from trireme.kernels.cuda_emulator import Emulator

BUILD = Path(__file__).resolve().parents[2] / "build" / "emulator"


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not cuda_emulator.is_available():
        pytest.skip("the CUDA emulator needs g++ on x86-64")
    return Emulator(BUILD)
