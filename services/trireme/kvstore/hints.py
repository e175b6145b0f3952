"""The scheduler's hints: blocks that will be needed soon are read from SSD ahead of their readers."""

from __future__ import annotations

import logging

from trireme.bus.streams import Stream
from trireme.errors import InvalidRequest
from trireme.kvcache.tiered_store import TieredStore
from trireme.runtime.clock import Clock
from trireme.wire.bus.v1.facts_pb2 import Hint

log = logging.getLogger(__name__)

_STALE_S = 5.0


async def follow_hints(store: TieredStore, hints: Stream[Hint], *, clock: Clock) -> None:
    """Prefetch what new hints name, one hint after another, for ever; stale ones are passed over."""
    async for entry in hints.tail():
        hint = entry.fact
        if clock.unix_s() - hint.made_unix_s > _STALE_S:
            continue
        try:
            promoted = await store.prefetch(hint.namespace, hint.block_hashes)
        except InvalidRequest as error:
            log.warning("hint_malformed", extra={"hint": hint.id, "error": error.message})
            continue
        if promoted:
            log.debug("hint_followed", extra={"hint": hint.id, "blocks": promoted})
