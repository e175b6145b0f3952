"""What the store tells the fleet: its health, its record and a measurement per second."""

from __future__ import annotations

import asyncio
import logging
import uuid

from trireme.bus.connection import AWAY
from trireme.bus.streams import Stream
from trireme.kvcache.tiered_store import TieredStore
from trireme.runtime.clock import Clock
from trireme.runtime.health import Health
from trireme.wire.bus.v1.facts_pb2 import KvWindow, Measurement

log = logging.getLogger(__name__)

_LOOP_STALLED_S = 3.0


def health_of(store: TieredStore, clock: Clock) -> Health:
    """Healthy while the loop turns; an SSD that is off, or does not answer, is no illness."""
    loop_s = clock.monotonic_s() - store.last_sweep_s
    if loop_s > _LOOP_STALLED_S:
        return Health(healthy=False, status=f"no turn of the loop for {loop_s:.1f} s")
    status = store.ssd.status if store.ssd is not None else ""
    return Health(healthy=True, status=status or "ok")


async def publish_measurements(
    store: TieredStore, stream: Stream[Measurement], *, node: str, clock: Clock, window_s: float = 1.0
) -> None:
    """Publish one window after another, for ever; windows that end while Redis is away are lost."""
    lookups, hits, start_s = 0, 0, clock.monotonic_s()
    while True:
        await asyncio.sleep(window_s)
        counters, now_s = store.counters, clock.monotonic_s()
        window = KvWindow(
            node=node,
            dram_bytes=store.dram.used_bytes,
            ssd_bytes=store.ssd.segments.used_bytes if store.ssd else 0,
            lookups=counters.lookups - lookups,
            hits=counters.matched - hits,
        )
        lookups, hits = counters.lookups, counters.matched
        measurement = Measurement(
            id=uuid.uuid4().hex, at_unix_s=clock.unix_s(), window_s=now_s - start_s, kv=window
        )
        start_s = now_s
        try:
            await stream.publish(measurement)
        except AWAY as error:
            log.info("measurement_lost", extra={"error": str(error)})
