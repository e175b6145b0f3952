"""How fast this machine's cores read memory together: the floor of a decoding step is weights over this."""

from __future__ import annotations

import functools
import time
from typing import Final

import torch

from trireme.kernels.cpu_library import cpu_library

_BYTES: Final = 128 * 2**20
"""More than caches hold."""
_TRIES: Final = 3


@functools.cache
def read_bytes_per_s(threads: int) -> float:
    """Measured once, in some 50 ms: the best of a few readings; 0 where the CPU's library is not there."""
    library = cpu_library()
    if library is None:
        return 0.0
    memory = torch.ones(_BYTES // 8, dtype=torch.int64)
    best_s = float("inf")
    for _ in range(_TRIES):
        started_s = time.perf_counter()
        library.read(memory.data_ptr(), _BYTES, threads)
        best_s = min(best_s, time.perf_counter() - started_s)
    return _BYTES / best_s
