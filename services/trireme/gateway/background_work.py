"""What this gateway drives without a client: started here, or taken over from a gateway that died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

from trireme.bus.connection import AWAY
from trireme.gateway.work_leases import WorkLeases
from trireme.runtime.shutdown import end_tasks

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""How often leases are renewed and others' are looked at; a sixth of a lease."""
CLAIMS_AT_ONCE = 16
AGAIN_S = 2.0
"""Work that failed unexpectedly is left alone for so long, here."""


class BackgroundWork:
    """Drives one kind of work: each piece in a task, under its lease.

    Args:
        drive: does one piece from wherever it stands, and returns when there is nothing left to do. It
            is cancelled where the lease is lost or the gateway leaves: it must then leave the work as
            another gateway can go on with it.
        most: pieces held at once; more wait for other gateways, or for room.
    """

    def __init__(
        self, leases: WorkLeases, drive: Callable[[str], Awaitable[None]], *, what: str, most: int
    ) -> None:
        self._leases = leases
        self._drive = drive
        self._what = what
        self._most = most
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._leaving = False

    async def start(self, work_id: str) -> None:
        """Begin new work here; where this gateway has its hands full or leaves, any may take it.

        Raises:
            One of AWAY: Redis did not take it.
        """
        await self._leases.take(work_id)
        if self._leaving or len(self._driving) >= self._most:
            await self._leases.release(work_id)
        else:
            self._begin(work_id)

    async def run(self) -> None:
        """Renew, and take over what others left; for ever."""
        while not self._leaving:
            try:
                await self._beat()
            except AWAY as error:
                log.warning("background_without_redis", extra={"what": self._what, "error": str(error)})
            await asyncio.sleep(BEAT_S)

    async def leave(self) -> None:
        """Stop driving; other gateways go on at once."""
        self._leaving = True
        held = list(self._driving)
        await end_tasks(self._driving.values())
        for work_id in held:
            try:
                await self._leases.release(work_id)
            except AWAY:
                return  # The leases end by themselves.

    async def _beat(self) -> None:
        for work_id in await self._leases.renew(list(self._driving)):
            task = self._driving.get(work_id)
            if task is not None:
                log.warning("work_taken_over", extra={"what": self._what, "id": work_id})
                task.cancel()
        room = min(CLAIMS_AT_ONCE, self._most - len(self._driving))
        if room <= 0 or self._leaving:
            return
        for work_id in await self._leases.claim(room):
            if work_id not in self._driving:
                log.info("work_taken", extra={"what": self._what, "id": work_id})
                self._begin(work_id)

    def _begin(self, work_id: str) -> None:
        # Not in the context of the call that asked for it, which ends long before.
        task = asyncio.create_task(self._to_its_end(work_id), context=Context())
        self._driving[work_id] = task

        def ended(done: asyncio.Task[Any]) -> None:
            if self._driving.get(work_id) is done:
                del self._driving[work_id]
            if not done.cancelled() and done.exception() is not None:
                log.error("work_failed", exc_info=done.exception(), extra={"what": self._what, "id": work_id})

        task.add_done_callback(ended)

    async def _to_its_end(self, work_id: str) -> None:
        try:
            await self._drive(work_id)
        except AWAY as error:
            log.warning("work_without_redis", extra={"what": self._what, "id": work_id, "error": str(error)})
            await asyncio.sleep(AGAIN_S)
            await self._leases.release(work_id)
        except Exception:
            await asyncio.sleep(AGAIN_S)
            await self._leases.release(work_id)
            raise
        else:
            await self._leases.done(work_id)
