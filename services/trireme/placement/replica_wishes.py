"""How many workers each group should have where a cluster runs them: fleet.yaml, and what Scale asked for.

Wishes are kept in Redis, where all replicas of placement read them. A wish holds over the number
that fleet.yaml had when it was made: who changes the number there means the new one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.errors import InvalidRequest, ServiceUnavailable
from trireme.placement.desired import MAX_REPLICAS
from trireme.policies.placement import GroupTarget
from trireme.runtime.fleet import Fleet

ANSWER_S = 2.0


class ReplicaWishes:
    """What should be, as far as was last heard."""

    def __init__(self, fleet: Fleet, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.ledger("placement-replicas")
        self._from_file = {
            group.name: GroupTarget(
                group=group.name, replicas=group.replicas, variants=fleet.served_by(group)
            )
            for group in fleet.workers
        }
        self._wishes: dict[str, int] = {}

    async def refresh(self) -> None:
        """Read what was asked for at any replica.

        Raises:
            AWAY: Redis is; what was last heard stays.
        """
        read = cast("Awaitable[dict[bytes, bytes]]", self._redis.hgetall(self._key))
        async with asyncio.timeout(ANSWER_S):
            kept = await read
        wishes = {}
        for name, raw in kept.items():
            group, wish = name.decode(), json.loads(raw)
            if group in self._from_file and wish["over"] == self._from_file[group].replicas:
                wishes[group] = int(wish["replicas"])
        self._wishes = wishes

    def targets(self) -> list[GroupTarget]:
        """One per group, in the order of fleet.yaml."""
        return [
            GroupTarget(group=name, replicas=self._wishes.get(name, each.replicas), variants=each.variants)
            for name, each in self._from_file.items()
        ]

    def is_overridden(self, group: str) -> bool:
        """Whether a group differs from fleet.yaml."""
        file = self._from_file[group].replicas
        return self._wishes.get(group, file) != file

    async def scale(self, group: str, replicas: int) -> int:
        """Wish for so many workers; returns how many were wished for before.

        Raises:
            InvalidRequest: no such group, or too many replicas.
            ServiceUnavailable: Redis is away; nothing changed.
        """
        if group not in self._from_file:
            known = ", ".join(self._from_file)
            raise InvalidRequest(f"no worker group {group!r}: fleet.yaml has {known}", param="group")
        if not 0 <= replicas <= MAX_REPLICAS:
            raise InvalidRequest(f"replicas must be 0..{MAX_REPLICAS}, not {replicas}", param="replicas")
        file = self._from_file[group].replicas
        try:
            await self.refresh()
            before = self._wishes.get(group, file)
            wish = json.dumps({"replicas": replicas, "over": file})
            await self._redis.hset(self._key, group, wish)
        except AWAY as error:
            raise ServiceUnavailable("the bus is away, so the change was not kept: try again") from error
        self._wishes = {**self._wishes, group: replicas}
        return before
