"""Whether a tenant may have one of the workers' last free places, so that others find one when they come.

Pure. Whoever asks more than there is would fill every place the moment it is free, and a tenant that
asks little would wait for somebody's end each time. So while others are about, a tenant that has held
more than its part of late (an equal one, or as its weight says), or that has held most and has a
backlog, leaves one place free: the next newcomer starts at once, and what ends meanwhile makes room for
the one after it. Beyond the batch it has nothing handed over either, since that would start in front of
the newcomer. A tenant alone may hold everything, and what a tenant held is forgotten within seconds of
its leaving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

MEMORY_S = 5.0
"""Of what a tenant has used, 63 % is forgotten in so long."""
FORGOTTEN_PLACES = 0.02
"""A tenant that used less of late counts as absent."""
KEPT_PLACES = 1
"""Between two ends no more than one newcomer is to be expected: requests come no faster than they end."""
EQUAL: Mapping[str, float] = {}
"""Every tenant weighs 1."""


def used_of_late(
    before: Mapping[str, float], in_flight: Mapping[str, int], *, passed_s: float
) -> dict[str, float]:
    """Places that each tenant has held on average, after `passed_s` with `in_flight`."""
    weight = 1.0 - math.exp(-max(0.0, passed_s) / MEMORY_S)
    used = {
        tenant: (1.0 - weight) * before.get(tenant, 0.0) + weight * in_flight.get(tenant, 0)
        for tenant in before.keys() | in_flight.keys()
    }
    return {
        tenant: places
        for tenant, places in used.items()
        if places >= FORGOTTEN_PLACES or in_flight.get(tenant, 0)
    }


def may_take(
    tenant: str,
    *,
    used: Mapping[str, float],
    backlogged: bool,
    slots: int,
    running_free: int,
    queueing_free: int,
    weights: Mapping[str, float] = EQUAL,
) -> bool:
    """Whether the tenant may be handed one more request's place.

    Args:
        used: places that each tenant has held of late (`used_of_late`).
        backlogged: more of its requests wait than this one.
        slots: sequences that the workers run at once.
        running_free: of them, those that nobody holds.
        queueing_free: requests that the workers take beyond what they run.
        weights: of tenants; those that are not there weigh 1.
    """
    own = used.get(tenant, 0.0) / weights.get(tenant, 1.0)
    others = [places / weights.get(name, 1.0) for name, places in used.items() if name != tenant]
    over_its_part = own > slots / sum(weights.get(name, 1.0) for name in used.keys() | {tenant})
    if not others or not (over_its_part or (backlogged and own >= max(others))):
        return running_free + queueing_free > 0
    # Where there is one place only, its owner alternates.
    return running_free > min(KEPT_PLACES, slots - 1)
