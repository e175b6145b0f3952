"""Keep Python's garbage collector off millions of blocks.

Blocks and runs are freed by their reference counts: whoever drops one breaks its cycle. The collector
would walk all of them again and again, which stops the loop for a tenth of a second per million. So what
has lived for some seconds is set aside, and looked through only when nobody has asked anything for a while.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time

from trireme.kvcache.tiered_store import TieredStore

log = logging.getLogger(__name__)

_PERIOD_S = 5.0
_QUIET_S = 10.0
_THOROUGH_S = 3600.0


async def set_aside_blocks(store: TieredStore) -> None:
    """Set aside what lives, for ever; once an hour, when it is quiet, collect what died in between."""
    thorough_s = time.monotonic()
    asked, asked_s = -1, time.monotonic()
    while True:
        gc.collect(1)
        gc.freeze()
        await asyncio.sleep(_PERIOD_S)
        counters, now_s = store.counters, time.monotonic()
        if (now := counters.lookups + store.saves.committed_blocks + counters.dram_hits) != asked:
            asked, asked_s = now, now_s
        if now_s - asked_s >= _QUIET_S and now_s - thorough_s >= _THOROUGH_S:
            gc.unfreeze()
            found = gc.collect()
            thorough_s = time.monotonic()
            log.info("garbage_collected", extra={"objects": found, "seconds": thorough_s - now_s})
