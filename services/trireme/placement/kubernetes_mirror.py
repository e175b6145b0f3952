"""A copy of the cluster's objects of one kind, kept by a list and the watch that follows it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from trireme.placement.kubernetes_api import (
    ApiExpired,
    ApiProblem,
    ApiThrottled,
    JsonObject,
    WatchEvent,
)
from trireme.runtime.clock import Clock

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
SHORT_WATCH_S = 1.0
"""A watch that ends sooner is no progress: the next one waits as after a failure."""


class WatchCall(Protocol):
    """`KubernetesApi.watch_pods`, say."""

    def __call__(self, selector: str, version: str, *, watch_s: int) -> AsyncIterator[WatchEvent]: ...


ListCall = Callable[[str], Awaitable[tuple[list[JsonObject], str]]]


class Mirror:
    """What was last seen of one kind; while the API is away, what was seen before."""

    def __init__(
        self,
        what: str,
        selector: str,
        *,
        list_all: ListCall,
        watch: WatchCall,
        watch_s: int,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        self.objects: dict[str, JsonObject] = {}
        """By name."""
        self.problem = ""
        """Why it is out of touch, one phrase; empty: it is in touch."""
        self.counts: Counter[str] = Counter()
        """Lists, watches, and problems by class."""
        self._what = what
        self._selector = selector
        self._list_all = list_all
        self._watch = watch
        self._watch_s = watch_s
        self._clock = clock
        self._on_change = on_change
        self._version = ""
        self._contact_s: float | None = None

    def age_s(self) -> float:
        """Seconds since the API last told, or confirmed, what is here; infinite before the first list."""
        if self._contact_s is None:
            return float("inf")
        return self._clock.monotonic_s() - self._contact_s

    async def run(self) -> None:
        """Keep in touch for ever."""
        failures = 0
        while True:
            began_s = self._clock.monotonic_s()
            pause_s = 0.0
            try:
                await self.follow()
            except ApiExpired:
                self._version = ""
                self.counts["ApiExpired"] += 1
            except ApiProblem as error:
                self.counts[type(error).__name__] += 1
                if not self.problem:
                    log.warning("kubernetes_watch_broke", extra={"what": self._what, "error": str(error)})
                self.problem = str(error)
                if isinstance(error, ApiThrottled):
                    pause_s = error.retry_after_s
            if self._clock.monotonic_s() - began_s >= SHORT_WATCH_S and not self.problem:
                failures = 0
                continue
            pause_s = max(pause_s, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, 10)))
            failures += 1
            # Replicas that lost the API together do not come back together.
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.5))

    async def follow(self) -> None:
        """One watch, after a list where there is none to follow; returns when the server ends it.

        Raises:
            ApiProblem: it broke; what was seen stays.
        """
        if not self._version:
            found, version = await self._list_all(self._selector)
            self.counts["list"] += 1
            self.objects = {_name(each): each for each in found}
            self._version = version
            self._in_touch()
            self._on_change()
        self.counts["watch"] += 1
        async for event in self._watch(self._selector, self._version, watch_s=self._watch_s):
            self._take(event)
        self._in_touch()

    def _take(self, event: WatchEvent) -> None:
        self._in_touch()
        if event.kind == "OPENED":
            return
        self._version = str(event.found["metadata"]["resourceVersion"])
        if event.kind == "BOOKMARK":
            return
        if event.kind == "DELETED":
            self.objects.pop(_name(event.found), None)
        else:
            self.objects[_name(event.found)] = event.found
        self._on_change()

    def _in_touch(self) -> None:
        if self.problem:
            log.info("kubernetes_watch_back", extra={"what": self._what})
        self.problem = ""
        self._contact_s = self._clock.monotonic_s()


def _name(found: JsonObject) -> str:
    return str(found["metadata"]["name"])
