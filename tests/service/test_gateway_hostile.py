"""A gateway in a process of its own against calls that nobody should send, while others are served.

`python -m benchmarks.hostile` does the same with ten times as many, against a whole fleet.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from tokenizers import Tokenizer

from benchmarks.hostile import grpc_messages, http_requests
from benchmarks.hostile.raw_connections import (
    grpc_connections,
    http_connections,
    send_all,
    slow_connections,
)
from benchmarks.hostile.verdicts import Verdicts
from tests.conftest import free_port
from tests.service.gateway_fleet import CHECKPOINT, KEYS, FakeWorker, fleet
from tests.service.processes import service
from trireme.client import Delta, Sampling, TriremeClient
from trireme.runtime.shutdown import end_tasks
from trireme.wire.bus.v1.facts_pb2 import RequestKind
from trireme.wire.inference.v1.inference_pb2 import FINISH_REASON_STOP

IDS = (
    Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode("for x in y:\n    print('é😀')\n" * 3).ids
)
MODELS = ["py", "py-1m"]
GROWTH_MIB = 64


@dataclass
class Gateway:
    grpc: str
    http: str
    process: psutil.Process


async def answer_all(worker: FakeWorker) -> None:
    """Whatever gets as far as a worker is answered."""
    while True:
        assignment = await worker.assigned.get()
        request = assignment.request
        if request.kind == RequestKind.REQUEST_KIND_SCORE:
            worker.emit(assignment, finish=1, scores=[-1.0] * len(request.continuations))
        elif request.kind == RequestKind.REQUEST_KIND_EMBED:
            worker.emit(assignment, finish=1, embedding=[1.0, 0.5])
        else:
            worker.answer(assignment, IDS, finish=FINISH_REASON_STOP)


@asynccontextmanager
async def served(redis_url: str, folder: Path) -> AsyncIterator[Gateway]:
    port = free_port(2)
    grpc_address, http_address = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    async with fleet(redis_url, folder) as world:
        answering = asyncio.create_task(answer_all(world.workers[0]))
        with service(
            "gateway",
            folder / "gateway.log",
            fleet=world.fleet_file,
            redis_url=redis_url,
            bus_prefix=KEYS.prefix,
            grpc_listen=grpc_address,
            http_listen=http_address,
        ) as process:
            async with TriremeClient([grpc_address]) as client, asyncio.timeout(90):
                while not await _ready(client):
                    await asyncio.sleep(0.1)
            yield Gateway(grpc_address, f"http://{http_address}", psutil.Process(process.pid))
        await end_tasks([answering])


async def _ready(client: TriremeClient) -> bool:
    return any(model.ready for model in await client.list_models())


async def control(address: str, streams: list[list[int]]) -> None:
    """Somebody else's streams, one after the other."""
    async with TriremeClient([address]) as client:
        while True:
            events = [event async for event in client.generate("py", "control", Sampling(max_tokens=200))]
            streams.append([i for event in events if isinstance(event, Delta) for i in event.token_ids])
            await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_hostile_calls_are_refused_and_nobody_else_notices(redis_url: str, tmp_path: Path) -> None:
    rng = random.Random(20261121)
    async with served(redis_url, tmp_path) as gateway:
        verdicts = Verdicts()
        http_address = gateway.http.removeprefix("http://")

        def attack() -> None:
            with grpc.insecure_channel(gateway.grpc) as channel:
                methods = grpc_messages.methods(channel)
                words = grpc_messages.Words(MODELS)
                grpc_messages.ask_all(channel, methods, words, verdicts, each=6, seed=1)
                grpc_messages.ask_too_much(channel, methods[-2:], verdicts)
            http_requests.ask_all(gateway.http, MODELS, verdicts, each=2, seed=1)
            generate = "/trireme.wire.inference.v1.Inference/Generate"
            send_all(gateway.grpc, grpc_connections(generate, rng, 36), verdicts, kind="grpc frames")
            send_all(http_address, http_connections(rng, 36), verdicts, kind="http bytes")

        streams: list[list[int]] = []
        others = asyncio.create_task(control(gateway.grpc, streams))
        try:
            async with asyncio.timeout(120):
                while len(streams) < 3:
                    await asyncio.sleep(0.01)
            before_bytes = gateway.process.memory_info().rss
            with slow_connections([http_address, gateway.grpc], 20):
                await asyncio.to_thread(attack)
            count = len(streams)
            async with asyncio.timeout(120):
                while len(streams) < count + 2:  # It goes on afterwards.
                    await asyncio.sleep(0.01)
            grown_mib = (gateway.process.memory_info().rss - before_bytes) / 2**20
        finally:
            assert not others.done() or others.exception() is None, others
            await end_tasks([others])
        assert not verdicts.faults, "\n".join(verdicts.faults)
        assert verdicts.calls >= 280, verdicts.outcomes
        assert all(stream == IDS for stream in streams)
        assert grown_mib < GROWTH_MIB
        log = (tmp_path / "gateway.log").read_text(encoding="utf-8")
        assert "Traceback" not in log, log[-3000:]
