"""The desired fleet: fleet.yaml, and what was changed since by Scale, LoadVariant, UnloadVariant.

Changes are kept in Redis before they are answered, so a killed placement comes back with
them. They carry the run's id: the next `trireme up` starts from fleet.yaml again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys, persistently
from trireme.errors import InvalidRequest, ModelNotFound, ServiceUnavailable
from trireme.policies.placement import GroupTarget
from trireme.runtime.fleet import Fleet

MAX_REPLICAS = 256
"""As many as fleet.yaml allows."""


@dataclass(frozen=True, slots=True)
class _Wish:
    replicas: int
    variants: tuple[str, ...]


class DesiredFleet:
    """What should be."""

    def __init__(self, fleet: Fleet, redis: Redis, keys: Keys, *, run_id: str) -> None:
        self.fleet = fleet
        self._redis = redis
        self._key = keys.ledger("placement")
        self._run_id = run_id
        self._from_file = {
            group.name: _Wish(group.replicas, fleet.served_by(group)) for group in fleet.workers
        }
        self._wishes = dict(self._from_file)
        self._of_workers: dict[str, tuple[str, ...]] = {}

    async def restore(self) -> None:
        """Take back what this run had changed before placement was killed; waits for Redis."""
        raw = await persistently(lambda: self._redis.get(self._key), what="desired_fleet")
        if raw is None:
            return
        kept = json.loads(raw)
        if kept["run_id"] != self._run_id:
            return
        for name, wish in kept["groups"].items():
            if name in self._wishes:
                self._wishes[name] = _Wish(wish["replicas"], tuple(wish["variants"]))
        self._of_workers = {worker: tuple(names) for worker, names in kept["workers"].items()}

    def targets(self) -> list[GroupTarget]:
        """One per group, in the order of fleet.yaml."""
        return [
            GroupTarget(group=name, replicas=wish.replicas, variants=wish.variants)
            for name, wish in self._wishes.items()
        ]

    def is_overridden(self, group: str) -> bool:
        """Whether a group differs from fleet.yaml."""
        return self._wishes[group] != self._from_file[group]

    def own_variants(self, worker_id: str) -> tuple[str, ...] | None:
        """What one worker should serve, where that was asked for."""
        return self._of_workers.get(worker_id)

    async def scale(self, group: str, replicas: int) -> int:
        """Wish for so many workers; returns how many were wished for before.

        Raises:
            InvalidRequest: no such group, or too many replicas.
            ServiceUnavailable: Redis is away; nothing changed.
        """
        wish = self._wish(group)
        if not 0 <= replicas <= MAX_REPLICAS:
            raise InvalidRequest(f"replicas must be 0..{MAX_REPLICAS}, not {replicas}", param="replicas")
        await self._change_group(group, _Wish(replicas, wish.variants))
        return wish.replicas

    async def change_group_variant(self, group: str, variant: str, *, load: bool) -> None:
        """Add or remove a variant on all workers of a group; errors as in `scale`."""
        wish = self._wish(group)
        variants = self._changed(wish.variants, variant, load)
        await self._change_group(group, _Wish(wish.replicas, variants))

    async def change_worker_variant(self, worker_id: str, group: str, variant: str, *, load: bool) -> None:
        """Add or remove a variant on one worker; errors as in `scale`."""
        before = self._of_workers.get(worker_id, self._wish(group).variants)
        after = {**self._of_workers, worker_id: self._changed(before, variant, load)}
        await self._save(self._wishes, after)
        self._of_workers = after

    def forget_worker(self, worker_id: str) -> None:
        """A worker ended: what it alone should serve is void (and saved as such at the next change)."""
        self._of_workers.pop(worker_id, None)

    def _wish(self, group: str) -> _Wish:
        if group not in self._wishes:
            known = ", ".join(self._wishes)
            raise InvalidRequest(f"no worker group {group!r}: fleet.yaml has {known}", param="group")
        return self._wishes[group]

    def _changed(self, before: tuple[str, ...], variant: str, load: bool) -> tuple[str, ...]:
        known = [name for model in self.fleet.models.values() for name in model.variants]
        if variant not in known:
            raise ModelNotFound(f"no variant {variant!r}: fleet.yaml has {', '.join(known)}", param="variant")
        rest = tuple(name for name in before if name != variant)
        return (*rest, variant) if load else rest

    async def _change_group(self, group: str, wish: _Wish) -> None:
        after = {**self._wishes, group: wish}
        await self._save(after, self._of_workers)
        self._wishes = after

    async def _save(self, wishes: dict[str, _Wish], of_workers: dict[str, tuple[str, ...]]) -> None:
        groups = {name: {"replicas": w.replicas, "variants": w.variants} for name, w in wishes.items()}
        body = {"run_id": self._run_id, "groups": groups, "workers": of_workers}
        try:
            await self._redis.set(self._key, json.dumps(body))
        except AWAY as error:
            raise ServiceUnavailable("the bus is away, so the change was not kept: try again") from error
