"""Whether this gateway can get an answer now: the bus, a scheduler and a worker are there."""

from __future__ import annotations

import time

from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.health import Health

BUS_SILENCE_S = 5.0
"""The registry is read twice a second; silence for so long means that Redis is away."""


def fleet_answers(links: WorkerLinks) -> Health:
    """The probe behind readiness; the process itself may be well while this is not."""
    scanned_s = links.scanned_s
    if scanned_s is None:
        return Health(healthy=False, status="the bus was not reached yet")
    if time.monotonic() - scanned_s > BUS_SILENCE_S:
        return Health(healthy=False, status="the bus does not answer")
    if not links.living("scheduler"):
        return Health(healthy=False, status="no scheduler is alive")
    if not links.served_variants():
        return Health(healthy=False, status="no worker serves a variant")
    return Health(healthy=True)
