"""Philox4x32-10, a counter-based generator: the n-th number is computed, not reached.

A draw depends on (seed, token index) alone. A sequence that is preempted, batched with others
or taken over by another worker therefore draws the same numbers.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


def philox4x32(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox over a batch of counters.

    Args:
        counters: (4, n), each entry below 2**32.
        key: two words below 2**32.

    Returns:
        (4, n): four random words per counter, each below 2**32.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniforms(seed: int, start: int, count: int, *, stream: int = 0) -> list[float]:
    """Uniform draws in [0, 1) with 53 bits for token indices start .. start + count - 1.

    Args:
        seed: 64 bits; the generator's key.
        stream: keeps draws for different purposes at one index apart; 0 chooses the token.
    """
    indices = np.arange(start, start + count, dtype=np.uint64)
    counters = np.zeros((4, count), dtype=np.uint64)
    counters[0] = indices & _LOW
    counters[1] = indices >> _SHIFT
    counters[2] = stream
    words = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    draws: list[float] = ((high * np.uint64(1 << 26) + low).astype(np.float64) / float(1 << 53)).tolist()
    return draws
