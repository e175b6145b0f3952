"""Hints from the bus: what waits, soonest first, told to the store's look-ahead."""

from __future__ import annotations

import logging

from trireme.bus.streams import Stream
from trireme.errors import InvalidRequest
from trireme.kvcache.block_codec import BlockKey, block_keys
from trireme.kvcache.tiered_store import TieredStore
from trireme.kvcache.waiting_jobs import WaitingJob
from trireme.runtime.clock import Clock
from trireme.wire.bus.v1.facts_pb2 import Hint, WaitingRequest

log = logging.getLogger(__name__)

_STALE_S = 5.0


async def follow_hints(store: TieredStore, hints: Stream[Hint], *, clock: Clock) -> None:
    """Tell the store what new hints say, for ever; stale ones are passed over."""
    async for entry in hints.tail():
        hint = entry.fact
        age_s = clock.unix_s() - hint.made_unix_s
        if age_s <= _STALE_S:
            hear_hint(store, hint, now_s=clock.monotonic_s() - max(0.0, age_s))


def hear_hint(store: TieredStore, hint: Hint, *, now_s: float) -> None:
    """Tell the store what a hint says that was made at `now_s` by the store's clock."""
    starts = [*hint.start_in_s, *[0.0] * (len(hint.request_ids) - len(hint.start_in_s))]
    order = [
        WaitingJob(request_id, now_s + start_in_s)
        for request_id, start_in_s in zip(hint.request_ids, starts, strict=False)
    ]
    chains = {each.request_id: keys for each in hint.described if (keys := _chain_of(store, each))}
    store.look_ahead.hear(hint.source, order, chains)


def _chain_of(store: TieredStore, waiting: WaitingRequest) -> list[BlockKey]:
    """The blocks a request will need: its prompt's, or its conversation's where it names none."""
    if not waiting.block_hashes and waiting.session_id:
        session = store.sessions.get(waiting.tenant, waiting.session_id)
        return list(session.keys) if session is not None else []
    try:
        return block_keys(waiting.namespace, waiting.block_hashes)
    except InvalidRequest as error:
        log.warning("hint_malformed", extra={"request_id": waiting.request_id, "error": error.message})
        return []
