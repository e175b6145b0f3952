"""What a worker tells the fleet each window: measurements, residency, its registry record."""

from __future__ import annotations

import asyncio
import time
import uuid

from trireme.bus.connection import AWAY
from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import EngineWindow, Measurement, Residency
from trireme.worker.variants import LoadedVariant, VariantTable

WINDOW_S = 1.0
RESIDENCY_S = 0.1


async def report_measurements(
    worker_id: str, device: str, variants: VariantTable, stream: Stream[Measurement]
) -> None:
    """Publish one EngineWindow per variant and window, for ever; idle windows too."""
    last: dict[str, tuple[float, ...]] = {}
    while True:
        await asyncio.sleep(WINDOW_S)
        for loaded in variants:
            totals = _totals(loaded)
            before = last.get(loaded.plan.variant, (0.0,) * len(totals))
            delta = [now - then for now, then in zip(totals, before, strict=True)]
            stats = loaded.stats
            window = EngineWindow(
                worker_id=worker_id,
                variant=loaded.plan.variant,
                device=device,
                busy_s=delta[0],
                steps=int(delta[1]),
                prefill_tokens=int(delta[2]),
                decode_tokens=int(delta[3]),
                cached_tokens=int(delta[4]),
                waiting=stats.waiting,
                running=stats.running,
                kv_usage=stats.kv_blocks_used / stats.kv_blocks_total,
                billed_joules=delta[5],
                billed_engine_s=delta[6],
            )
            fact = Measurement(id=uuid.uuid4().hex, at_unix_s=time.time(), window_s=WINDOW_S, engine=window)
            try:
                await stream.publish(fact)
            except AWAY:
                continue  # the next window carries this one's amounts too
            last[loaded.plan.variant] = totals


async def report_residency(worker_id: str, variants: VariantTable, stream: Stream[Residency]) -> None:
    """Tell schedulers which prefixes came and went, in batches, for ever."""
    announced: set[str] = set()
    while True:
        await asyncio.sleep(RESIDENCY_S)
        for loaded in variants:
            variant = loaded.plan.variant
            added, removed = loaded.take_residency()
            if not (added or removed or variant not in announced):
                continue
            fact = Residency(
                worker_id=worker_id,
                variant=variant,
                reset=variant not in announced,
                added=b"".join(added),
                removed=b"".join(removed),
            )
            try:
                await stream.publish(fact)
            except AWAY:
                # What was lost is told anew, from the start.
                loaded.added = list(loaded.resident)
                announced.discard(variant)
                continue
            announced.add(variant)


def _totals(loaded: LoadedVariant) -> tuple[float, ...]:
    return (
        loaded.stats.busy_s,
        float(loaded.stats.steps),
        float(loaded.stats.prefill_tokens),
        float(loaded.stats.decode_tokens),
        float(loaded.stats.prefix_hit_tokens),
        loaded.billed_joules,
        loaded.billed_engine_s,
    )
