"""The ledger in Redis: one hash per node, and the ids of the facts that it contains.

One script writes both, so that a fact's effect and its id are durable together or not at
all. Each start of the service takes a new epoch; a writer of an older one is refused, so
two services can never keep the same node's books.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.power.ledger import Ledger, from_json

log = logging.getLogger(__name__)

SEEN_S = 600.0
"""A fact's id is remembered for so long after it was taken in."""

_SAVE = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'ledger', ARGV[2])
for i = 5, #ARGV do redis.call('ZADD', KEYS[2], ARGV[3], ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[4])
return 1
"""


class Superseded(Exception):
    """Another power service has taken over this node's ledger."""


class LedgerStore:
    """Loads and saves one node's ledger."""

    def __init__(self, redis: Redis, keys: Keys, node: str) -> None:
        self._redis = redis
        self._ledger_key = keys.ledger(f"power:{node}")
        self._seen_key = keys.ledger(f"power:{node}:seen")
        self._epoch = 0

    async def take_over(self) -> Ledger:
        """Become the node's only writer and read what the last one left; empty where nothing is."""
        # A repeated command only skips a number.
        self._epoch = int(await self._redis.hincrby(self._ledger_key, "epoch", 1))
        text = cast(bytes | None, await self._redis.hget(self._ledger_key, "ledger"))
        if text is None:
            return Ledger()
        try:
            return from_json(text.decode())
        except ValueError as error:
            # The old state stays beside the new one for whoever wants to look.
            await self._redis.hset(self._ledger_key, "unreadable", text)
            log.error("ledger_unreadable", extra={"reason": str(error)})
            return Ledger()

    async def seen(self) -> dict[str, float]:
        """Ids of facts taken in lately, with the time they were."""
        found = await self._redis.zrange(self._seen_key, 0, -1, withscores=True)
        rows = cast(list[tuple[bytes, float]], found)
        return {fact_id.decode(): score for fact_id, score in rows}

    async def save(self, ledger: Ledger, fact_ids: Sequence[str], *, now_s: float) -> None:
        """Make the ledger durable together with the ids of the facts it has taken in since.

        Raises:
            Superseded: a later start of the service owns the ledger.
        """
        saved = await self._redis.eval(
            _SAVE,
            2,
            self._ledger_key,
            self._seen_key,
            str(self._epoch),
            ledger.to_json(),
            str(now_s),
            str(now_s - SEEN_S),
            *fact_ids,
        )
        if not saved:
            raise Superseded(f"epoch {self._epoch} of {self._ledger_key} is over")
