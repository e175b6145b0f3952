"""A gateway's surroundings for tests: a scripted worker at the edge, a scheduler that assigns at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.bus.registry import Registry
from trireme.bus.request_records import SCHEDULERS, WORKERS, Handover, RequestRecords, State
from trireme.bus.streams import Stream
from trireme.bus.waiting_work import work_tokens
from trireme.gateway.process import Gateway, running_gateway
from trireme.gateway.settings import Settings
from trireme.runtime.shutdown import end_tasks
from trireme.wire.bus.v1.facts_pb2 import (
    AdmittedRequest,
    Assignment,
    Decision,
    ProcessRecord,
    VariantStatus,
    WorkerStatus,
)
from trireme.wire.inference.v1.inference_pb2 import FINISH_REASON_STOP, Usage
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.wire.worker.v1 import worker_pb2_grpc as rpc

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "checkpoints" / "trireme-py-1m"
KEYS = Keys("test")
WITHIN_S = 60.0
"""How long a test waits for what must come."""
PATIENT = "slo: {interactive: {ttft_s: 3600}, standard: {ttft_s: 3600}, batch: {ttft_s: 3600}}"
"""Goals for tests of other things: none is given up as too slow on a busy machine."""


def write_fleet(folder: Path) -> Path:
    """A fleet file with one model `py` of two variants."""
    file = folder / "fleet.yaml"
    file.write_text(
        f"""
name: test
models:
  py:
    default: py-1m
    variants:
      py-1m: {{checkpoint: {CHECKPOINT}}}
      py-1m-half: {{checkpoint: {CHECKPOINT}, dtype: bfloat16}}
workers: [{{name: w, variants: [py-1m]}}]
{PATIENT}
"""
    )
    return file


class FakeWorker(rpc.WorkerServicer):
    """Speaks the worker's side of Connect; tests say what it sends."""

    figures: ClassVar[dict[str, Any]] = {}
    """More of what workers that are started from now on say of their variant."""

    def __init__(self, redis: Redis, worker_id: str) -> None:
        self.worker_id = worker_id
        self.figures = dict(type(self).figures)  # type: ignore[misc]
        self.records = RequestRecords(redis, KEYS)
        self.registry = Registry(redis, KEYS)
        self.assigned: asyncio.Queue[Assignment] = asyncio.Queue()
        self.messages: list[pb.GatewayMessage] = []
        self.streams: dict[str, asyncio.Queue[pb.TokenBatch]] = {}
        self.outputs: dict[str, list[pb.SequenceUpdate]] = {}
        self.known: dict[str, tuple[bytes, Assignment]] = {}
        self.owners: dict[str, str] = {}
        self.draining = False
        self._redis = redis
        self._news = asyncio.Condition()
        self._tasks: list[asyncio.Task[Any]] = []
        self._server = grpc.aio.server()
        rpc.add_WorkerServicer_to_server(self, self._server)
        self.address = ""

    async def start(self) -> FakeWorker:
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        await self.registry.put(self.record())
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._read())]
        return self

    def record(self) -> ProcessRecord:
        status = VariantStatus(variant="py-1m", model="py", ready=True, **self.figures)
        worker = WorkerStatus(device="cpu", variants=[status], draining=self.draining)
        return ProcessRecord(id=self.worker_id, service="worker", grpc_address=self.address, worker=worker)

    async def die(self) -> None:
        """As kill -9 does: the stream breaks, the lease runs out by itself."""
        await end_tasks(self._tasks)
        await self._server.stop(None)

    async def leave(self, *gateways: Gateway) -> None:
        """In order: the record says draining, these gateways have read it, then it is removed."""
        self.draining = True
        await self.registry.put(self.record())
        async with asyncio.timeout(WITHIN_S):
            while not all(self._is_known_to_drain(gateway) for gateway in gateways):
                await asyncio.sleep(0.02)
        await self.die()
        await self.registry.remove(self.worker_id)

    def _is_known_to_drain(self, gateway: Gateway) -> bool:
        records = gateway.links.living("worker")
        return any(record.id == self.worker_id and record.worker.draining for record in records)

    async def _renew(self) -> None:
        while True:
            await self.registry.put(self.record())
            await asyncio.sleep(0.3)

    async def _read(self) -> None:
        stream = Stream(self._redis, KEYS.assignments(self.worker_id), Assignment)
        await stream.create_group(WORKERS)
        while True:
            for entry in await stream.read_group(WORKERS, self.worker_id, count=16, block_ms=100):
                request = entry.fact.request
                self.known[request.request_id] = (entry.entry_id, entry.fact)
                self.owners[request.request_id] = request.gateway_id
                self.assigned.put_nowait(entry.fact)

    async def Connect(
        self, request_iterator: AsyncIterator[pb.GatewayMessage], context: Any
    ) -> AsyncIterator[pb.TokenBatch]:
        first = await anext(aiter(request_iterator))
        queue: asyncio.Queue[pb.TokenBatch] = asyncio.Queue()
        self.streams[first.hello.gateway_id] = queue
        listener = asyncio.create_task(self._listen(request_iterator, first.hello.gateway_id))
        try:
            while True:
                yield await queue.get()
        finally:
            listener.cancel()

    async def _listen(self, messages: AsyncIterator[pb.GatewayMessage], gateway_id: str) -> None:
        async for message in messages:
            match message.WhichOneof("what"):
                case "attach":
                    request_id = message.attach.request_id
                    self.owners[request_id] = gateway_id
                    if request_id in self.outputs:
                        self.send(gateway_id, *self.outputs[request_id])
                    elif request_id in self.known:
                        self.send(gateway_id, self.update(self.known[request_id][1]))
                    else:
                        self.streams[gateway_id].put_nowait(pb.TokenBatch(unknown=[request_id]))
                case "confirm":
                    known = self.known.get(message.confirm.request_id)
                    if known and await self.records.standing(message.confirm.request_id) is not None:
                        tokens = work_tokens(known[1].request)
                        await self.records.end(*known, State.FINISHED, tokens=tokens)
            async with self._news:
                self.messages.append(message)
                self._news.notify_all()

    def send(self, gateway_id: str, *updates: pb.SequenceUpdate) -> None:
        """One batch to one gateway."""
        self.streams[gateway_id].put_nowait(pb.TokenBatch(updates=updates, worker_id=self.worker_id))

    def update(
        self,
        assignment: Assignment,
        *,
        first: int = 0,
        ids: Sequence[int] = (),
        choice: int = 0,
        finish: int | None = None,
        error: tuple[str, str] | None = None,
        last: bool | None = None,
        logprobs: Sequence[Any] = (),
        **fields: Any,
    ) -> pb.SequenceUpdate:
        """An update of a request, as the worker would make it."""
        update = pb.SequenceUpdate(
            request_id=assignment.request.request_id,
            attempt=assignment.request.attempt,
            choice=choice,
            first_index=first,
            token_ids=ids,
            logprobs=logprobs,
            **fields,
        )
        update.admitted.variant = assignment.variant
        update.admitted.decision = assignment.decision
        update.admitted.started_unix_s = time.time()
        if finish is not None:
            update.finished.reason = finish  # type: ignore[assignment]
        if error is not None:
            update.finished.error_code, update.finished.error_message = error
        if last if last is not None else finish is not None:
            usage = Usage(cached_prompt_tokens=3, engine_s=0.5, joules=2.0, grams_co2e=0.25)
            update.usage.CopyFrom(usage)
        return update

    def emit(self, assignment: Assignment, **what: Any) -> None:
        """Make output, keep it for replays, and send it to the gateway that wants it."""
        update = self.update(assignment, **what)
        request_id = assignment.request.request_id
        self.outputs.setdefault(request_id, []).append(update)
        gateway_id = self.owners[request_id]
        if gateway_id in self.streams:
            self.send(gateway_id, update)

    def answer(self, assignment: Assignment, ids: Sequence[int], *, finish: int = FINISH_REASON_STOP) -> None:
        """All choices get these tokens, one message per token."""
        count = max(1, assignment.request.sampling.n)
        for index, token_id in enumerate(ids):
            for choice in range(count):
                last = index == len(ids) - 1
                self.emit(
                    assignment,
                    choice=choice,
                    first=index,
                    ids=[token_id],
                    finish=finish if last else None,
                    last=last and choice == count - 1,
                )

    async def heard(self, what: str, request_id: str | None = None) -> Any:
        """Wait for a message of that kind, and for what the worker does about it."""

        def found() -> list[Any]:
            kinds = [getattr(m, what) for m in self.messages if m.WhichOneof("what") == what]
            return [kind for kind in kinds if request_id in (None, kind.request_id)]

        async with asyncio.timeout(WITHIN_S), self._news:
            await self._news.wait_for(found)
            return found()[-1]

    async def next_assignment(self) -> Assignment:
        async with asyncio.timeout(WITHIN_S):
            return await self.assigned.get()


class FakeScheduler:
    """Assigns each request to the first living worker that it does not avoid."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._records = RequestRecords(redis, KEYS)
        self._registry = Registry(redis, KEYS)
        self.seen: list[AdmittedRequest] = []
        self.holding = asyncio.Event()
        """Set: nothing is assigned."""
        self.workers: list[str] = []
        self.mistakes: list[str] = []
        """Workers that the next requests go to, dead or avoided though they are."""

    async def run(self) -> None:
        requests = Stream(self._redis, KEYS.requests, AdmittedRequest)
        await requests.create_group(SCHEDULERS)
        held: list[Any] = []
        while True:
            await self._registry.put(ProcessRecord(id="scheduler-1", service="scheduler"))
            held += await requests.read_group(SCHEDULERS, "scheduler-1", count=64, block_ms=20)
            if self.holding.is_set():
                continue
            for entry in held[:]:
                living = [r.id for r in await self._registry.living("worker") if not r.worker.draining]
                request = entry.fact
                fit = [w for w in self.workers if w in living and w not in request.avoid_worker_ids]
                if self.mistakes:
                    fit = [self.mistakes.pop()]
                if not fit:
                    continue
                held.remove(entry)
                self.seen.append(request)
                assignment = Assignment(
                    request=request, variant="py-1m", worker_id=fit[0], decision="the only one"
                )
                decision = Decision(request_id=request.request_id, worker_id=fit[0])
                await self._records.assign(
                    [Handover(entry.entry_id, assignment, decision, work_tokens(request))]
                )


class Fleet:
    """What a test holds."""

    def __init__(self, redis: Redis, redis_url: str, folder: Path) -> None:
        self.redis = redis
        self.redis_url = redis_url
        self.fleet_file = write_fleet(folder)
        self.scheduler = FakeScheduler(redis)
        self.workers: list[FakeWorker] = []

    async def add_worker(self, worker_id: str) -> FakeWorker:
        worker = await FakeWorker(self.redis, worker_id).start()
        self.workers.append(worker)
        self.scheduler.workers.append(worker_id)
        return worker

    @asynccontextmanager
    async def gateway(self, **settings: Any) -> AsyncIterator[Gateway]:
        """A gateway that has streams to all workers."""
        values = {
            "fleet": self.fleet_file,
            "redis_url": self.redis_url,
            "bus_prefix": KEYS.prefix,
            "grpc_listen": "127.0.0.1:0",
            "http_listen": "127.0.0.1:0",
            "silence_s": 0.3,
            "usage_wait_s": WITHIN_S,
            **settings,
        }
        async with running_gateway(Settings(**values)) as gateway:
            async with asyncio.timeout(WITHIN_S):
                while not all(gateway.links.is_connected(w.worker_id) for w in self.workers):
                    await asyncio.sleep(0.01)
                while not gateway.health.overall().healthy and self.workers:
                    await asyncio.sleep(0.01)
            yield gateway


@asynccontextmanager
async def fleet(redis_url: str, folder: Path, *, workers: int = 1) -> AsyncIterator[Fleet]:
    """Redis, a scheduler and workers w1, w2, ..."""
    redis = Redis.from_url(redis_url)
    made = Fleet(redis, redis_url, folder)
    task = asyncio.create_task(made.scheduler.run())
    try:
        for number in range(workers):
            await made.add_worker(f"w{number + 1}")
        yield made
    finally:
        for worker in made.workers:
            await worker.die()
        await end_tasks([task])
        await redis.aclose()
