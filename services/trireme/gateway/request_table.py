"""The live requests of this gateway, by id, and what the workers' streams say about them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from trireme.errors import RequestFailed
from trireme.gateway.live_request import Applied, Lane, LiveRequest
from trireme.gateway.metrics import Metrics
from trireme.gateway.worker_links import WorkerLinks
from trireme.wire.worker.v1.worker_pb2 import SequenceUpdate, TokenBatch

log = logging.getLogger(__name__)

REPLAY_S = 1.0
"""Between two requests for a replay of the same output."""


class RequestTable:
    """Routes updates to live requests; hears the links.

    Args:
        on_lost: called with (worker_id, in_order) when a worker's requests must be served elsewhere.
        on_unknown: called with (live request, worker_id) when that worker does not know the request.
    """

    def __init__(
        self,
        links: WorkerLinks,
        metrics: Metrics,
        *,
        on_lost: Callable[[str, bool], None],
        on_unknown: Callable[[LiveRequest, str], None],
    ) -> None:
        self._links = links
        self._metrics = metrics
        self._on_lost = on_lost
        self._on_unknown = on_unknown
        self._live: dict[str, LiveRequest] = {}
        self._lanes: dict[str, dict[int, Lane]] = {}
        """By worker, then by lane; those of requests that are here."""
        self._replay_after_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def get(self, request_id: str) -> LiveRequest | None:
        """The live request of that id."""
        return self._live.get(request_id)

    def add(self, live: LiveRequest) -> None:
        """Take news of this request from now on."""
        self._live[live.request_id] = live
        self._metrics.inflight.set(len(self._live))

    def remove(self, live: LiveRequest) -> None:
        """Take no more news of it."""
        if self._live.get(live.request_id) is live:
            del self._live[live.request_id]
        for worker_id, lane in live.lanes:
            lanes = self._lanes.get(worker_id)
            if lanes is not None:
                lanes.pop(lane, None)
                if not lanes:
                    del self._lanes[worker_id]
        live.lanes.clear()
        self._replay_after_s.pop(live.request_id, None)
        self._metrics.inflight.set(len(self._live))

    def on_batch(self, worker_id: str, batch: TokenBatch) -> None:
        now_s = time.monotonic()
        live_of = self._live.get
        for update in batch.updates:
            live = live_of(update.request_id)
            if live is None:
                self._release(worker_id, update)
                continue
            try:
                outcome = live.apply(update, worker_id, now_s)
            except Exception:  # The request's own trouble must not stop the others on this stream.
                log.exception("update_failed", extra={"request_id": live.request_id, "worker_id": worker_id})
                live.fail(RequestFailed("the gateway could not read this answer"))
                continue
            if update.lane:
                self._learn_lane(live, update, worker_id)
            if outcome is not Applied.TAKEN:
                self._react(outcome, live, update.choice, worker_id, now_s)
        if batch.lanes:
            self._take_columns(worker_id, batch, now_s)
        for request_id in batch.unknown:
            live = live_of(request_id)
            if live is not None:
                self._on_unknown(live, worker_id)

    def _take_columns(self, worker_id: str, batch: TokenBatch, now_s: float) -> None:
        lanes = self._lanes.get(worker_id)
        if lanes is None:
            return
        for number, index, token_id in zip(batch.lanes, batch.indices, batch.token_ids, strict=False):
            lane = lanes.get(number)
            if lane is None:
                continue  # nobody here waits for it any more
            live = lane.live
            try:
                outcome = live.take(lane, index, token_id, now_s)
            except Exception:  # As above: it is this request's own trouble.
                log.exception("token_failed", extra={"request_id": live.request_id, "worker_id": worker_id})
                live.fail(RequestFailed("the gateway could not read this answer"))
                continue
            if outcome is not Applied.TAKEN:
                self._react(outcome, live, lane.number, worker_id, now_s)

    def _learn_lane(self, live: LiveRequest, update: SequenceUpdate, worker_id: str) -> None:
        if update.attempt != live.attempt or update.choice >= len(live.choices):
            return
        lanes = self._lanes.setdefault(worker_id, {})
        known = lanes.get(update.lane)
        if known is None or known.live is not live:
            choice = live.choices[update.choice]
            lanes[update.lane] = Lane(live, update.choice, choice, update.attempt, worker_id)
            live.lanes.append((worker_id, update.lane))

    def on_connected(self, worker_id: str) -> None:
        for live in self._live.values():
            if live.worker_id == worker_id and not live.accounted:
                self._links.attach(worker_id, live.request_id)

    def on_lost(self, worker_id: str, *, in_order: bool) -> None:
        self._on_lost(worker_id, in_order)

    def _react(self, outcome: Applied, live: LiveRequest, choice: int, worker_id: str, now_s: float) -> None:
        if outcome is Applied.STALE:
            self._metrics.duplicates.inc()
        elif outcome is Applied.STOP_CHOICE:
            self._links.stop(worker_id, live.request_id, reason="stop_string", choice=choice)
        elif outcome is Applied.GAP:
            self._metrics.gaps.inc()
            if now_s >= self._replay_after_s.get(live.request_id, 0.0):
                self._replay_after_s[live.request_id] = now_s + REPLAY_S
                self._links.attach(worker_id, live.request_id)

    def _release(self, worker_id: str, update: SequenceUpdate) -> None:
        # Nobody here waits for it: its client went away. Once it ended the worker may forget it.
        if update.HasField("usage"):
            self._links.confirm(worker_id, update.request_id, [])
