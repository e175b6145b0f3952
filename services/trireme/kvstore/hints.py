"""Hints from the bus: what waits, soonest first, told to the store's look-ahead.

What will run on this node and lies on another one is fetched ahead, too.
"""

from __future__ import annotations

import asyncio
import logging

from trireme.bus.streams import Stream
from trireme.errors import InvalidRequest
from trireme.kvcache.block_codec import HASH_BYTES, BlockKey, block_keys
from trireme.kvcache.tiered_store import TieredStore
from trireme.kvcache.waiting_jobs import WaitingJob
from trireme.kvstore.peers import Peers
from trireme.runtime.clock import Clock
from trireme.wire.bus.v1.facts_pb2 import Hint, WaitingRequest

log = logging.getLogger(__name__)

_STALE_S = 5.0
_PULLS = 2
"""Chains fetched ahead from other nodes at once."""
_WAITING_PULLS = 32
_PULL_S = 5.0


class HintFollower:
    """Follows the hints of one node."""

    def __init__(self, store: TieredStore, peers: Peers, *, clock: Clock) -> None:
        self._store = store
        self._peers = peers
        self._clock = clock
        self._pulls: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(_PULLS)

    async def follow(self, hints: Stream[Hint]) -> None:
        """Tell the store what new hints say, for ever; stale ones are passed over."""
        async for entry in hints.tail():
            age_s = self._clock.unix_s() - entry.fact.made_unix_s
            if age_s <= _STALE_S:
                self.hear(entry.fact, age_s=max(0.0, age_s))

    def hear(self, hint: Hint, *, age_s: float) -> None:
        """Tell the store what a hint says that was made so long ago."""
        made_s = self._clock.monotonic_s() - age_s
        starts = [*hint.start_in_s, *[0.0] * (len(hint.request_ids) - len(hint.start_in_s))]
        order = [
            WaitingJob(request_id, made_s + start_in_s)
            for request_id, start_in_s in zip(hint.request_ids, starts, strict=False)
        ]
        chains = {}
        for waiting in hint.described:
            keys = self._chain_of(waiting)
            if keys:
                chains[waiting.request_id] = keys
                self._pull_ahead(waiting, keys)
        self._store.look_ahead.hear(hint.source, order, chains)

    def _chain_of(self, waiting: WaitingRequest) -> list[BlockKey]:
        """The blocks a request will need: its prompt's, or its conversation's where it names none."""
        if not waiting.block_hashes and waiting.session_id:
            session = self._store.sessions.get(waiting.tenant, waiting.session_id)
            return list(session.keys) if session is not None else []
        try:
            return block_keys(waiting.namespace, waiting.block_hashes)
        except InvalidRequest as error:
            log.warning("hint_malformed", extra={"request_id": waiting.request_id, "error": error.message})
            return []

    def _pull_ahead(self, waiting: WaitingRequest, keys: list[BlockKey]) -> None:
        if not (waiting.runs_here and self._store.peers) or len(self._pulls) >= _WAITING_PULLS:
            return
        missing = waiting.block_hashes[len(self._store.leading(keys)) * HASH_BYTES :]
        if missing:
            task = asyncio.create_task(self._pull(waiting.namespace, missing))
            self._pulls.add(task)
            task.add_done_callback(self._pulls.discard)

    async def _pull(self, namespace: str, block_hashes: bytes) -> None:
        async with self._turn:
            await self._peers.pull(namespace, block_hashes, deadline_s=_PULL_S)
