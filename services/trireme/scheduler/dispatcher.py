"""The loop of the scheduler: requests in, assignments out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from trireme.bus.connection import AWAY
from trireme.bus.request_records import SCHEDULERS, Handover, RequestRecords, State
from trireme.bus.streams import Entry, Stream
from trireme.bus.waiting_work import URGENCY, work_tokens
from trireme.policies.fair_sharing import Waiting, cost
from trireme.policies.fair_window import FairWindow
from trireme.policies.prefix_index import split_hashes
from trireme.policies.routing import Choice, RoutedRequest, WorkerView, choose_worker
from trireme.runtime.spans import Spans, span_ref
from trireme.scheduler.fleet_view import FleetView
from trireme.scheduler.metrics import Metrics
from trireme.scheduler.tenant_shares import TenantShares
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, Candidate, Decision

log = logging.getLogger(__name__)

READ_BATCH = 512
HANDOVER_BATCH = 64
LOOK_BACK_S = 5.0
"""Between two looks for requests whose reply was lost."""
RETRY_S = 0.02
"""Pause before asking again for room while all workers are full."""


class Dispatcher:
    """Holds the window of waiting requests and hands them out in fair order."""

    def __init__(
        self,
        *,
        scheduler_id: str,
        requests: Stream[AdmittedRequest],
        records: RequestRecords,
        view: FleetView,
        shares: TenantShares,
        metrics: Metrics,
        spans: Spans,
        window_requests: int,
    ) -> None:
        self._scheduler_id = scheduler_id
        self._requests = requests
        self._records = records
        self._view = view
        self._shares = shares
        self._metrics = metrics
        self._spans = spans
        self._window = window_requests
        self._held: FairWindow[bytes] = FairWindow()
        self._entries: dict[bytes, Entry[AdmittedRequest]] = {}
        self._answer_tokens: dict[str, float] = {}
        self._arrived = asyncio.Event()
        self.on_assigned: Callable[[AdmittedRequest, Choice], None] | None = None
        """Hears of each request that a worker has now."""
        self._looked_back_s = time.monotonic()
        self.last_progress_s = time.monotonic()
        """When the loop last turned; health follows from it."""

    def waiting_by_tenant(self) -> Mapping[str, int]:
        """Requests held here, by tenant."""
        return self._held.waiting_by_tenant

    def oldest_s(self) -> float:
        """Age of the oldest request held here."""
        oldest = self._held.oldest_admitted_s()
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def upcoming(self, count: int, *, now_s: float) -> list[AdmittedRequest]:
        """The next requests to be handed out, in order, if nobody else comes."""
        order = self._held.upcoming(counters=self._shares.counters, now_s=now_s, cost_of=self._cost_of)
        return [self._entries[key].fact for key in itertools.islice(order, count)]

    def note_answer(self, model: str, tokens: int) -> None:
        """A request ended with so many tokens per choice: the estimate for the next ones learns."""
        previous = self._answer_tokens.get(model, float(tokens))
        self._answer_tokens[model] = 0.95 * previous + 0.05 * tokens

    async def read(self) -> None:
        """Take requests from the stream into the window, for ever."""
        while True:
            room = self._window - len(self._held)
            if room <= 0:
                await asyncio.sleep(RETRY_S)
                continue
            entries = await self._requests.read_group(
                SCHEDULERS, self._scheduler_id, count=min(room, READ_BATCH), block_ms=500
            )
            self.hold(entries)
            await asyncio.sleep(0)  # What is held goes out before more is asked for.
            await self._look_back()

    async def _look_back(self) -> None:
        """Hold what was read, but whose reply was lost with a connection: nobody else will."""
        if time.monotonic() - self._looked_back_s < LOOK_BACK_S:
            return
        self._looked_back_s = time.monotonic()
        try:
            lost = await self._requests.forgotten(
                SCHEDULERS, self._scheduler_id, held=self._entries, idle_ms=int(LOOK_BACK_S * 1000)
            )
        except AWAY:
            return
        if lost:
            log.warning("held_again", extra={"requests": len(lost)})
            self.hold(lost)

    def hold(self, entries: list[Entry[AdmittedRequest]]) -> None:
        """Put requests into the window."""
        for entry in entries:
            request = entry.fact
            if request.tenant not in self._held.waiting_by_tenant:
                self._shares.join(request.tenant, active=self._held.waiting_by_tenant)
            self._shares.note_weight(request.tenant, request.tenant_weight or 1.0)
            waiting = Waiting(
                request_id=request.request_id,
                tenant=request.tenant,
                urgency=URGENCY.get(request.slo_class, 1),
                priority=request.priority,
                admitted_s=request.admitted_unix_s,
            )
            self._entries[entry.entry_id] = entry
            self._held.add(entry.entry_id, waiting, model=request.model)
        if entries:
            self._arrived.set()

    async def dispatch(self) -> None:
        """Assign what is held as long as there is room, for ever."""
        while True:
            self.last_progress_s = time.monotonic()
            if not self._held:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(0.5):
                        await self._arrived.wait()
                except TimeoutError:
                    continue
            try:
                assigned = await self._assign_in_order()
            except AWAY:
                assigned = 0
            if not assigned:
                await asyncio.sleep(RETRY_S)

    async def _assign_in_order(self) -> int:
        """Hand out requests until nobody who waits can go; returns how many left the window."""
        chosen: list[tuple[Entry[AdmittedRequest], Choice]] = []
        expired: list[Entry[AdmittedRequest]] = []
        full: set[str] = set()
        kept: set[tuple[str, str]] = set()
        while len(chosen) < HANDOVER_BATCH:
            now_s = time.time()
            found = self._held.next(
                counters=self._shares.counters, now_s=now_s, without_models=full, without=kept
            )
            if found is None:
                break
            entry = self._entries[found[0]]
            if 0 < entry.fact.deadline_unix_s < now_s:
                self._held.discard(entry.entry_id)
                expired.append(entry)
                if len(expired) >= HANDOVER_BATCH:
                    break
                continue
            views = self._views(entry.fact)
            choice = self._choose(entry.fact, views)
            if choice is None:
                full.add(entry.fact.model)
                continue
            tenant = entry.fact.tenant
            backlogged = self._held.waiting_by_tenant[tenant] > 1
            if not self._view.may_take(
                tenant, entry.fact.model, views, backlogged=backlogged, weights=self._shares.weights
            ):
                kept.add((tenant, entry.fact.model))  # The others' turn comes all the same.
                continue
            self._held.discard(entry.entry_id)
            self._note(entry.fact, choice)
            chosen.append((entry, choice))
        try:
            await self._hand_over(chosen)
            await self._expire(expired)
        except AWAY:
            # They wait again; what had been done nevertheless is stale the next time.
            self.hold([entry for entry in (*(e for e, _ in chosen), *expired) if self._has(entry)])
            raise
        return len(chosen) + len(expired)

    def _release(self, entry: Entry[AdmittedRequest]) -> None:
        # It may have been held again meanwhile, as taken over from a replica that died.
        self._held.discard(entry.entry_id)
        self._entries.pop(entry.entry_id, None)

    def _has(self, entry: Entry[AdmittedRequest]) -> bool:
        return entry.entry_id in self._entries

    def _views(self, request: AdmittedRequest) -> list[WorkerView]:
        return self._view.views(request.model, split_hashes(request.prefix_hashes))

    def _choose(self, request: AdmittedRequest, views: Sequence[WorkerView]) -> Choice | None:
        routed = RoutedRequest(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            expected_answer_tokens=self._expected_answer(request),
            choices=max(1, request.sampling.n),
            urgency=URGENCY.get(request.slo_class, 1),
            avoid_worker_ids=frozenset(request.avoid_worker_ids),
        )
        return choose_worker(routed, views)

    def _note(self, request: AdmittedRequest, choice: Choice) -> None:
        """Count a choice at once, so that the next one in this pass sees it."""
        self._view.note_assigned(
            choice.worker_id,
            choice.variant,
            tenant=request.tenant,
            tokens=work_tokens(request),
            hashes=split_hashes(request.prefix_hashes),
        )
        self._shares.charge(request.tenant, self._cost(request, choice))

    def _take_back(self, request: AdmittedRequest, choice: Choice) -> None:
        """The choice had no effect: it costs the tenant nothing and fills no place."""
        self._view.note_withdrawn(choice.worker_id, tenant=request.tenant, tokens=work_tokens(request))
        self._shares.charge(request.tenant, -self._cost(request, choice))

    def _cost_of(self, key: bytes) -> float:
        request = self._entries[key].fact
        return cost(
            prompt_tokens=len(request.prompt_token_ids),
            answer_tokens=int(self._expected_answer(request) * max(1, request.sampling.n)),
            tenant_weight=request.tenant_weight or 1.0,
        )

    def _cost(self, request: AdmittedRequest, choice: Choice) -> float:
        return cost(
            prompt_tokens=len(request.prompt_token_ids) - choice.cached_tokens,
            answer_tokens=int(self._expected_answer(request) * max(1, request.sampling.n)),
            tenant_weight=request.tenant_weight or 1.0,
        )

    async def _hand_over(self, chosen: list[tuple[Entry[AdmittedRequest], Choice]]) -> None:
        """Make the choices durable; what was stale, or could not be made so, is taken back."""
        begun_unix_s = time.time()
        handovers = [self._handover(entry, choice) for entry, choice in chosen]
        try:
            assigned = await self._records.assign(handovers)
        except AWAY:
            for entry, choice in chosen:
                self._take_back(entry.fact, choice)
            raise
        now_s = time.time()
        for (entry, choice), done in zip(chosen, assigned, strict=True):
            self._release(entry)
            if not done:
                self._take_back(entry.fact, choice)
            else:
                self._trace(entry.fact, choice, begun_unix_s, now_s)
                if self.on_assigned is not None:
                    self.on_assigned(entry.fact, choice)
            self._metrics.decided(assigned=done, waited_s=now_s - entry.fact.admitted_unix_s)

    def _trace(
        self, request: AdmittedRequest, choice: Choice, start_unix_s: float, end_unix_s: float
    ) -> None:
        root = span_ref(request.traceparent)
        if root is None or not root.sampled:
            return
        self._spans.put(
            "trireme.scheduler.assign",
            None,
            # What goes on after a lost worker does so in the phase that its tokens had begun.
            parent=root.phase("decode" if any(d.ids for d in request.delivered) else "queue"),
            start_unix_s=start_unix_s,
            end_unix_s=end_unix_s,
            attributes={
                "trireme.request_id": request.request_id,
                "trireme.attempt": request.attempt,
                "trireme.decision": choice.reason,
                "trireme.worker_id": choice.worker_id,
                "trireme.variant": choice.variant,
                "trireme.candidates": len(choice.estimates),
            },
        )

    def _handover(self, entry: Entry[AdmittedRequest], choice: Choice) -> Handover:
        request = entry.fact
        now_s = time.time()
        return Handover(
            entry_id=entry.entry_id,
            assignment=Assignment(
                request=request,
                variant=choice.variant,
                worker_id=choice.worker_id,
                initial_queue=choice.initial_queue,
                expected_cached_tokens=choice.cached_tokens,
                decision=choice.reason,
                assigned_unix_s=now_s,
            ),
            decision=self._explain(request, choice, now_s),
            tokens=work_tokens(request),
        )

    def _expected_answer(self, request: AdmittedRequest) -> float:
        """Answer tokens of one choice, by what requests to this model have used so far."""
        limit = float(request.sampling.max_tokens)
        return min(limit, self._answer_tokens.get(request.model, limit))

    def _explain(self, request: AdmittedRequest, choice: Choice, now_s: float) -> Decision:
        return Decision(
            request_id=request.request_id,
            attempt=request.attempt,
            worker_id=choice.worker_id,
            variant=choice.variant,
            reason=choice.reason,
            candidates=[
                Candidate(
                    worker_id=estimate.worker_id,
                    variant=estimate.variant,
                    finish_s=estimate.finish_s,
                    queue_s=estimate.queue_s,
                    prefill_s=estimate.prefill_s,
                    decode_s=estimate.decode_s,
                    cached_tokens=estimate.cached_tokens,
                )
                for estimate in choice.estimates[:16]
            ],
            tenant_virtual_tokens=self._shares.counters.get(request.tenant, 0.0),
            decided_unix_s=now_s,
            scheduler_id=self._scheduler_id,
        )

    async def _expire(self, entries: list[Entry[AdmittedRequest]]) -> None:
        for entry in entries:
            await self._records.settle(entry.fact.request_id, State.FAILED)
            await self._records.withdraw(entry.entry_id, entry.fact)
            self._release(entry)
            log.info("expired_in_queue", extra={"request_id": entry.fact.request_id})
