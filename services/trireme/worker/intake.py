"""Assignments in: the engine gets their sequences at once; KV found in lower tiers follows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from trireme.bus.connection import AWAY, persistently
from trireme.bus.request_records import WORKERS, RequestRecords
from trireme.bus.streams import Entry, Stream
from trireme.bus.waiting_work import work_tokens
from trireme.errors import TriremeError
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment
from trireme.worker.block_loads import BlockLoads
from trireme.worker.engine_messages import Add, Command, Gone, Refused
from trireme.worker.live_requests import LiveRequest
from trireme.worker.request_chains import RequestChains, prompt_hashes
from trireme.worker.request_table import RequestTable, new_choices
from trireme.worker.variants import LoadedVariant, VariantTable

log = logging.getLogger(__name__)

READ_BATCH = 64
LOOK_BACK_S = 2.0
"""Between two looks for assignments whose reply was lost."""


class Intake:
    """Reads this worker's assignments until it drains.

    Args:
        send: has the engine process do something.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        assignments: Stream[Assignment],
        records: RequestRecords,
        table: RequestTable,
        variants: VariantTable,
        send: Callable[[Command], None],
        loads: BlockLoads,
        chains: RequestChains,
    ) -> None:
        self._worker_id = worker_id
        self._assignments = assignments
        self._records = records
        self._table = table
        self._variants = variants
        self._send = send
        self._loads = loads
        self._chains = chains
        self._starting: set[asyncio.Task[None]] = set()
        self._looked_back_s = time.monotonic()
        self._draining = False
        self.handed_back = 0
        """Assignments that other workers got instead."""

    def drain(self) -> None:
        """From now on hand back what is assigned: schedulers see late that this worker leaves."""
        self._draining = True

    async def run(self) -> None:
        """Take assignments for ever."""
        while True:
            entries = await self._assignments.read_group(
                WORKERS, self._worker_id, count=READ_BATCH, block_ms=500
            )
            for entry in [*entries, *await self._forgotten()]:
                loaded = self._variants.find(entry.fact.variant)
                if self._draining or loaded is None or not loaded.ready:
                    await self._hand_back(entry)
                else:
                    self._accept(entry)

    async def _forgotten(self) -> list[Entry[Assignment]]:
        """Assignments that were read, but whose reply was lost with a connection."""
        if time.monotonic() - self._looked_back_s < LOOK_BACK_S:
            return []
        self._looked_back_s = time.monotonic()
        try:
            return await self._assignments.forgotten(
                WORKERS, self._worker_id, held=self._table.held_entries, idle_ms=int(LOOK_BACK_S * 1000)
            )
        except AWAY:
            return []

    async def _hand_back(self, entry: Entry[Assignment]) -> None:
        """Queue a request again that was assigned but not begun."""
        request = AdmittedRequest()
        request.CopyFrom(entry.fact.request)
        if self._worker_id not in request.avoid_worker_ids:
            request.avoid_worker_ids.append(self._worker_id)
        await persistently(lambda: self._records.requeue(request, crashed=False), what="hand back")
        tokens = work_tokens(entry.fact.request)
        await persistently(
            lambda: self._records.let_go(entry.entry_id, entry.fact, tokens=tokens), what="hand back"
        )
        self.handed_back += 1

    def _accept(self, entry: Entry[Assignment]) -> None:
        request = entry.fact.request
        if entry.entry_id in self._table.held_entries:
            return
        if self._table.has_attempt(request.request_id, request.attempt):
            self._table.let_go(entry.entry_id, entry.fact)
            return
        live = LiveRequest(
            assignment=entry.fact,
            entry_id=entry.entry_id,
            gateway_id=request.gateway_id,
            choices=new_choices(request.delivered, max(1, request.sampling.n)),
            work_tokens=work_tokens(request),
        )
        self._table.add(live)
        if self._table.is_stopped(request.request_id):
            self._table.fail(live, code="cancelled", message="stopped before it began")
            return
        try:
            loaded = self._variants.get(entry.fact.variant)
        except TriremeError as error:
            self._table.fail(live, code=error.code, message=error.message)
            return
        self._submit(live, loaded)

    def _submit(self, live: LiveRequest, loaded: LoadedVariant) -> None:
        wanted = tuple(
            (number, choice.handle) for number, choice in enumerate(live.choices) if choice.finished is None
        )
        if not wanted:
            return
        request = live.assignment.request
        hashes = prompt_hashes(request, loaded.block_tokens)
        self._chains.follow(live, hashes, loaded.block_tokens)
        awaited_tokens = self._loads.expect(live, loaded, hashes)
        queue = live.assignment.initial_queue
        self._send(
            Add(live.variant, request.SerializeToString(), wanted, awaited_tokens, initial_queue=queue)
        )

    def refused(self, what: Refused) -> None:
        """The engine does not take a request: it ends with the engine's error."""
        live = self._table.request_of(what.handles[0])
        if live is not None:
            self._table.fail(live, code=what.code, message=what.message)

    def gone(self, what: Gone) -> None:
        """The variant was unloaded before the engine had the request: another worker takes it."""
        live = self._table.request_of(what.handles[0])
        if live is not None and live.ended_s is None:
            self._table.withdraw(live)
            self._in_background(self._hand_back(Entry(live.entry_id, live.assignment)))

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
