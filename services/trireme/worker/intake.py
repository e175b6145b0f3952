"""Assignments in: KV found in lower tiers is fetched, then the engine gets the sequences."""

from __future__ import annotations

import asyncio
import logging

from trireme.bus.request_records import WORKERS, RequestRecords, work_tokens
from trireme.bus.streams import Entry, Stream
from trireme.engine import Engine, Mode, SamplingParams, SequenceRequest
from trireme.errors import ModelNotFound, TriremeError
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

    async def run(self) -> None:
        """Take assignments for ever."""
        while True:
            entries = await self._assignments.read_group(
                WORKERS, self._worker_id, count=READ_BATCH, block_ms=500
            )
            for entry in entries:
                self._accept(entry)

    async def hand_back(self) -> int:
        """While draining: queue again what was assigned but not begun; returns how many."""
        handed = 0
        while True:
            entries = await self._assignments.read_group(
                WORKERS, self._worker_id, count=READ_BATCH, block_ms=None
            )
            if not entries:
                return handed
            for entry in entries:
                request = AdmittedRequest()
                request.CopyFrom(entry.fact.request)
                request.avoid_worker_ids.append(self._worker_id)
                await self._records.requeue(request, crashed=False)
                await self._assignments.acknowledge(WORKERS, [entry.entry_id], delete=True)
                handed += 1

    def _accept(self, entry: Entry[Assignment]) -> None:
        request = entry.fact.request
        if self._table.has_attempt(request.request_id, request.attempt):
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
            task = asyncio.create_task(self._fetch_then_submit(live, sequences, hashes))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)
        else:
            self._submit(live, sequences)

    async def _fetch_then_submit(
        self, live: LiveRequest, sequences: list[SequenceRequest], hashes: list[bytes]
    ) -> None:
        await self._blocks.fetch(live.assignment.variant, hashes)
        self._submit(live, sequences)

    def _submit(self, live: LiveRequest, sequences: list[SequenceRequest]) -> None:
        variant = live.assignment.variant
        loop = asyncio.get_running_loop()

        def refuse(code: str, message: str) -> None:
            self._table.fail(live, code=code, message=message)

        def add(engines: dict[str, Engine]) -> None:
            try:
                engine = engines.get(variant)
                if engine is None:
                    raise ModelNotFound(f"variant {variant!r} was unloaded")
                for sequence in sequences:
                    engine.add(sequence)
            except TriremeError as error:
                loop.call_soon_threadsafe(refuse, error.code, error.message)

        self._engines.post(add)
        if self._table.is_stopped(live.request_id):
            self._table.stop(live.request_id, None)


def sequences_of(request: AdmittedRequest) -> list[SequenceRequest]:
    """The engine's sequences of a request, one per choice.

    Raises:
        InvalidRequest: sampling parameters are out of range.
    """
    prompt = list(request.prompt_token_ids)
    return [
        SequenceRequest(
            sequence_id=sequence_id(request.request_id, number),
            prompt_token_ids=prompt,
            delivered_token_ids=(
                list(request.delivered[number].ids) if number < len(request.delivered) else ()
            ),
            sampling=sampling_of(request.sampling, choice=number),
            salt=request.kv_salt,
            priority=request.priority,
            arrival_s=request.admitted_unix_s,
            mode=_MODES[request.kind],
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
