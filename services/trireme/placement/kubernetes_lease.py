"""Who of several placement replicas acts: the holder of a Lease of coordination.k8s.io.

No two machines' clocks are compared. A holder acts for two thirds of the Lease's time after it
sent its last renewal; others take the Lease when they saw it unchanged for all of that time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress

from trireme.placement.kubernetes_api import (
    ApiConflict,
    ApiMissing,
    ApiProblem,
    JsonObject,
    KubernetesApi,
)
from trireme.runtime.clock import Clock

log = logging.getLogger(__name__)

ACTING_SHARE = 2 / 3
RENEWALS = 6
"""Within a Lease's time."""


class LeaderLease:
    """This process's part in the election."""

    def __init__(
        self, api: KubernetesApi, name: str, identity: str, *, duration_s: int, clock: Clock
    ) -> None:
        self.holder = ""
        """Who held it when it was last seen; empty: nobody."""
        self.problem = ""
        """Why it could not be read or written, one phrase; empty: it could."""
        self._api = api
        self._name = name
        self._identity = identity
        self._duration_s = duration_s
        self._clock = clock
        self._acts_until_s = 0.0
        self._seen_version = ""
        self._seen_s = 0.0

    def held(self) -> bool:
        """Whether this process may act now."""
        return self._clock.monotonic_s() < self._acts_until_s

    async def run(self) -> None:
        """Take part for ever."""
        while True:
            held = self.held()
            await self.step()
            if self.held() != held:
                log.info("leadership_changed", extra={"leads": self.held(), "holder": self.holder})
            await asyncio.sleep(self._duration_s / RENEWALS * random.uniform(0.8, 1.0))

    async def step(self) -> None:
        """Renew it, take it where it is free, or look at it."""
        try:
            await self._step()
            self.problem = ""
        except ApiConflict:
            self.problem = ""  # another was faster; the next look tells who
        except ApiProblem as error:
            self.problem = str(error)

    async def _step(self) -> None:
        try:
            lease = await self._api.read_lease(self._name)
        except ApiMissing:
            lease = await self._api.create_lease(self._name)
        spec = lease.get("spec") or {}
        version = str(lease["metadata"]["resourceVersion"])
        if version != self._seen_version:
            self._seen_version, self._seen_s = version, self._clock.monotonic_s()
        self.holder = spec.get("holderIdentity") or ""
        theirs_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        others = self.holder not in ("", self._identity)
        if others and self._clock.monotonic_s() - self._seen_s <= theirs_s:
            return
        sent_s = self._clock.monotonic_s()
        changed = await self._api.change_lease(self._name, self._spec(spec), version=version)
        self.holder = self._identity
        self._acts_until_s = sent_s + self._duration_s * ACTING_SHARE
        self._seen_version, self._seen_s = str(changed["metadata"]["resourceVersion"]), sent_s

    def _spec(self, before: JsonObject) -> JsonObject:
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(self._clock.unix_s()))
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration_s,
            "renewTime": now,
        }
        if before.get("holderIdentity") != self._identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(before.get("leaseTransitions") or 0) + 1
        return spec

    async def release(self) -> None:
        """Let another take it at once; of no consequence where the API is away."""
        if not self.held():
            return
        self._acts_until_s = 0.0
        with suppress(ApiProblem):
            lease = await self._api.read_lease(self._name)
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                version = str(lease["metadata"]["resourceVersion"])
                await self._api.change_lease(self._name, {"holderIdentity": None}, version=version)
