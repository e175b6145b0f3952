"""How a worker bills energy: share out a step's seconds, look up the tariff, multiply.

Pure. The worker calls these at the end of each engine step, the simulator too; the
power service checks afterwards that what was billed equals what the meter read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

JOULES_PER_KWH = 3.6e6


def split_step_s(step_s: float, tokens: Sequence[int]) -> tuple[float, ...]:
    """Share one step's wall time over its sequences in proportion to the tokens computed for each.

    The shares sum to `step_s` up to rounding. A step that computed no tokens is shared equally.
    """
    if not tokens:
        return ()
    total = sum(tokens)
    if total <= 0:
        return tuple(step_s / len(tokens) for _ in tokens)
    return tuple(step_s * count / total for count in tokens)


def metered_device(device: str) -> str:
    """The device whose meter covers a worker's device slice.

    A MIG slice is covered by its GPU (`cuda:0/mig:1` -> `cuda:0`); a worker without a
    model (`null`) runs on the CPU.
    """
    base = device.partition("/")[0]
    return "cpu" if base == "null" else base


def tariff_for(rates: Mapping[str, float], *, node: str, device: str) -> float | None:
    """Joules per engine second for a worker, from `Tariff.joules_per_engine_s`.

    Each node's power service publishes its devices as `node/device`. None: the tariff is of
    another node or says nothing of this device, so the worker keeps the one it has. The
    unqualified device and then the key "" serve tariffs that name no node.
    """
    metered = metered_device(device)
    own = rates.get(f"{node}/{metered}")
    if own is not None:
        return own
    if any("/" in key for key in rates):
        return None
    return rates.get(metered, rates.get(""))


def bill_joules(engine_s: float, joules_per_engine_s: float) -> float:
    """What `engine_s` costs at the tariff in force at the moment it is spent."""
    return engine_s * joules_per_engine_s


def grams_co2e(joules: float, grams_co2e_per_kwh: float) -> float:
    """Emissions of `joules` on a grid of that intensity."""
    return joules / JOULES_PER_KWH * grams_co2e_per_kwh


def per_1k_tokens(amount: float, tokens: int) -> float:
    """`amount` per 1000 tokens; 0 where there were none."""
    return 1000.0 * amount / tokens if tokens > 0 and math.isfinite(amount) else 0.0
