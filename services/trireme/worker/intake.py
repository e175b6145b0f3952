"""Assignments in: KV found in lower tiers is fetched, then the engine gets the sequences."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine

from trireme.bus.connection import AWAY, persistently
from trireme.bus.request_records import WORKERS, RequestRecords, work_tokens
from trireme.bus.streams import Entry, Stream
from trireme.engine import Engine, Mode, SamplingParams, SequenceRequest
from trireme.errors import InvalidRequest, TriremeError
from trireme.policies.prefix_index import split_hashes
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters
from trireme.worker.block_traffic import BlockTraffic
from trireme.worker.engine_thread import EngineThread
from trireme.worker.live_requests import LiveRequest, sequence_id
from trireme.worker.request_table import RequestTable, new_choices
from trireme.worker.variants import VariantTable

log = logging.getLogger(__name__)

READ_BATCH = 64
LOOK_BACK_S = 2.0
"""Between two looks for assignments whose reply was lost."""

_MODES = {
    RequestKind.REQUEST_KIND_GENERATE: Mode.GENERATE,
    RequestKind.REQUEST_KIND_SCORE: Mode.SCORE,
    RequestKind.REQUEST_KIND_EMBED: Mode.EMBED,
}


class Intake:
    """Reads this worker's assignments until it drains."""

    def __init__(
        self,
        *,
        worker_id: str,
        assignments: Stream[Assignment],
        records: RequestRecords,
        table: RequestTable,
        variants: VariantTable,
        engines: EngineThread,
        blocks: BlockTraffic,
    ) -> None:
        self._worker_id = worker_id
        self._assignments = assignments
        self._records = records
        self._table = table
        self._variants = variants
        self._engines = engines
        self._blocks = blocks
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
            sequences = sequences_of(request)
        except TriremeError as error:
            self._table.fail(live, code=error.code, message=error.message)
            return
        hashes = split_hashes(request.prefix_hashes)
        if self._blocks.worth_asking(loaded, hashes):
            self._in_background(self._fetch_then_submit(live, sequences, hashes))
        else:
            self._submit(live, sequences)

    async def _fetch_then_submit(
        self, live: LiveRequest, sequences: list[SequenceRequest], hashes: list[bytes]
    ) -> None:
        try:
            await self._blocks.fetch(live.assignment.variant, hashes)
        except Exception:  # What cannot be fetched is computed.
            log.exception("fetch_failed", extra={"request_id": live.request_id})
        self._submit(live, sequences)

    def _submit(self, live: LiveRequest, sequences: list[SequenceRequest]) -> None:
        # It may have been stopped, or overtaken by a later attempt, while blocks were fetched.
        wanted = [
            sequence
            for sequence, choice in zip(sequences, live.choices, strict=True)
            if choice.finished is None and self._table.holds(live)
        ]
        if not wanted:
            return
        variant = live.assignment.variant
        loop = asyncio.get_running_loop()

        def refuse(code: str, message: str) -> None:
            self._table.fail(live, code=code, message=message)

        def add(engines: dict[str, Engine]) -> None:
            try:
                engine = engines.get(variant)
                if engine is None:
                    loop.call_soon_threadsafe(self._withdraw, live)
                    return
                for sequence in wanted:
                    engine.add(sequence)
            except TriremeError as error:
                loop.call_soon_threadsafe(refuse, error.code, error.message)

        self._engines.post(add)

    def _withdraw(self, live: LiveRequest) -> None:
        """The variant was unloaded before the engine had the request: another worker takes it."""
        if self._table.holds(live) and live.ended_s is None:
            self._table.withdraw(live)
            self._in_background(self._hand_back(Entry(live.entry_id, live.assignment)))

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)


def sequences_of(request: AdmittedRequest) -> list[SequenceRequest]:
    """The engine's sequences of a request, one per choice.

    Raises:
        InvalidRequest: sampling parameters are out of range, or the kind is unknown here.
    """
    mode = _MODES.get(request.kind)
    if mode is None:
        raise InvalidRequest(f"requests of kind {request.kind} are not served", param="kind")
    prompt = list(request.prompt_token_ids)
    return [
        SequenceRequest(
            sequence_id=sequence_id(request, number),
            prompt_token_ids=prompt,
            delivered_token_ids=(
                list(request.delivered[number].ids) if number < len(request.delivered) else ()
            ),
            sampling=sampling_of(request.sampling, choice=number),
            salt=request.kv_salt,
            priority=request.priority,
            arrival_s=request.admitted_unix_s,
            mode=mode,
            score_continuations=[list(tokens.ids) for tokens in request.continuations],
        )
        for number in range(max(1, request.sampling.n))
    ]


def sampling_of(parameters: SamplingParameters, *, choice: int) -> SamplingParams:
    """The engine's form of the wire's sampling parameters; each choice has a seed of its own."""
    return SamplingParams(
        max_tokens=max(1, parameters.max_tokens),
        min_tokens=parameters.min_tokens,
        temperature=parameters.temperature if parameters.HasField("temperature") else 1.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p if parameters.HasField("top_p") else 1.0,
        min_p=parameters.min_p,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        repetition_penalty=(
            parameters.repetition_penalty if parameters.HasField("repetition_penalty") else 1.0
        ),
        logit_bias=dict(parameters.logit_bias),
        seed=(parameters.seed + choice * 0x9E3779B97F4A7C15) % 2**64,
        logprobs=parameters.logprobs if parameters.HasField("logprobs") else None,
        ignore_eos=parameters.ignore_eos,
        stop_token_ids=tuple(parameters.stop_token_ids),
    )
