"""What the engines will run next, told to the node's KV store, so that it fetches ahead of their turns.

The scheduler tells what it has handed out; only the engine knows the order in which its sequences run.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from trireme.bus.connection import AWAY
from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import Hint, WaitingRequest
from trireme.worker.block_loads import BlockLoads, Expected
from trireme.worker.live_requests import LiveRequest
from trireme.worker.variants import LoadedVariant

PERIOD_S = 0.05
"""Between two hints."""
MAX_TOLD = 256
DESCRIBE_AGAIN_S = 10.0
REPEAT_S = 2.0
FORGET_S = 1.0
LONGEST_S = 3600.0


class QueueHints:
    """One source of hints.

    Args:
        source: the worker's id.
        is_here: whether a request is still this worker's.
    """

    def __init__(
        self,
        source: str,
        loads: BlockLoads,
        stream: Stream[Hint],
        *,
        is_here: Callable[[LiveRequest], bool],
    ) -> None:
        self._source = source
        self._loads = loads
        self._stream = stream
        self._is_here = is_here
        self._told: list[str] = []
        self._told_s = 0.0
        self._described_s: dict[str, float] = {}

    async def run(self) -> None:
        """Publish for ever, where there is something to say."""
        forgot_s = time.monotonic()
        while True:
            await asyncio.sleep(PERIOD_S)
            now_s = time.monotonic()
            if now_s - forgot_s >= FORGET_S:
                self._loads.forget_ended(self._is_here)
                forgot_s = now_s
            hint = self.next_hint(now_s=now_s)
            if hint is not None:
                try:
                    await self._stream.publish(hint)
                except AWAY:
                    self._told, self._described_s = [], {}  # all of it is told anew

    def next_hint(self, *, now_s: float) -> Hint | None:
        """The order now; None where it was told already."""
        order = sorted(self._loads.upcoming(), key=lambda each: each[2])[:MAX_TOLD]
        names = [expected.live.request_id for expected, _, _ in order]
        is_stale = bool(names) and now_s - self._told_s >= REPEAT_S
        if names == self._told and not is_stale:
            return None
        known = {name: at_s for name, at_s in self._described_s.items() if now_s - at_s < DESCRIBE_AGAIN_S}
        described = [
            _describe(expected, loaded)
            for expected, loaded, _ in order
            if expected.live.request_id not in known
        ]
        self._described_s = known | dict.fromkeys([each.request_id for each in described], now_s)
        self._told, self._told_s = names, now_s
        return Hint(
            id=uuid.uuid4().hex,
            source=self._source,
            made_unix_s=time.time(),
            request_ids=names,
            start_in_s=[min(use_s, LONGEST_S) for _, _, use_s in order],
            described=described,
        )


def _describe(expected: Expected, loaded: LoadedVariant) -> WaitingRequest:
    request = expected.live.assignment.request
    return WaitingRequest(
        request_id=request.request_id,
        tenant=request.tenant,
        session_id=request.session_id,
        namespace=loaded.kv_namespace,
        block_hashes=b"".join(expected.hashes),
        runs_here=True,
    )
