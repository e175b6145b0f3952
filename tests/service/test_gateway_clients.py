"""Both clients against real gateways in real processes: kill -9 in the middle of an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.conftest import free_port
from tests.service.gateway_fleet import CHECKPOINT, KEYS, Fleet, fleet
from trireme.client import Accepted, Delta, Event, Paused, Sampling, Summary, SyncTriremeClient, TriremeClient
from trireme.errors import ModelNotFound, ServiceUnavailable
from trireme.gateway.settings import Settings
from trireme.runtime.settings import dump

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
TEXT = "for x in y:\n    print('é😀')\n"
IDS = TOKENIZER.encode(TEXT).ids


@asynccontextmanager
async def gateway_process(world: Fleet, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m trireme.gateway`, ready."""
    settings = Settings(
        fleet=world.fleet_file,
        redis_url=world.redis_url,
        bus_prefix=KEYS.prefix,
        grpc_listen=f"127.0.0.1:{port}",
        http_listen="127.0.0.1:0",
        drain_s=0.5,
    )
    environment = {
        **os.environ,
        **dump(settings, prefix="TRIREME_GATEWAY_"),
        "PYTHONPATH": f"{ROOT / 'libs'}{os.pathsep}{ROOT / 'services'}",
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "trireme.gateway", env=environment)
    try:
        async with TriremeClient([f"127.0.0.1:{port}"]) as client, asyncio.timeout(90):
            while not any(model.ready for model in await client.list_models()):
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(redis_url, tmp_path) as made:
        yield made


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_answer_survives_its_gateway(world: Fleet, kind: str, number: int) -> None:
    ports = [free_port(), free_port()]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    async with gateway_process(world, ports[0]) as first, gateway_process(world, ports[1]):
        events: list[Event] = []
        sampling = Sampling(max_tokens=64)

        async def read_async() -> None:
            async with TriremeClient(addresses) as client:
                client._addresses._position = 0
                async for event in client.generate("py", "x", sampling):
                    events.append(event)

        def read_sync() -> None:
            with SyncTriremeClient(addresses) as client:
                client._addresses._position = 0
                for event in client.generate("py", "x", sampling):
                    events.append(event)

        reading = asyncio.create_task(read_async() if kind == "async" else asyncio.to_thread(read_sync))
        worker = world.workers[0]
        assignment = await worker.next_assignment()
        worker.emit(assignment, ids=IDS[:7])
        async with asyncio.timeout(60):
            while len(tokens(events)) < 7:
                await asyncio.sleep(0.01)
        first.send_signal(number)
        await first.wait()
        assert first.returncode == (0 if number == signal.SIGTERM else -number)
        await worker.heard("attach", assignment.request.request_id)
        worker.emit(assignment, first=7, ids=IDS[7:], finish=1)
        async with asyncio.timeout(60):
            await reading
        assert tokens(events) == IDS
        assert "".join(event.text for event in events if isinstance(event, Delta)) == TEXT
        kinds = [type(event) for event in events]
        assert (kinds.count(Accepted), kinds.count(Summary), Paused in kinds) == (1, 1, True)
        assert not [message for message in worker.messages if message.HasField("stop")]


async def test_the_sync_client_has_the_same_calls(world: Fleet) -> None:
    port = free_port()
    async with gateway_process(world, port):
        worker = world.workers[0]
        with SyncTriremeClient([f"127.0.0.1:{port}"]) as client:
            names = [model.name for model in await asyncio.to_thread(client.list_models)]
            assert names == ["py", "py-1m", "py-1m-half"]
            classifying = asyncio.create_task(asyncio.to_thread(client.classify, "py", "x", ["a", "b"]))
            worker.emit(await worker.next_assignment(), finish=1, scores=[-2.0, -1.0])
            assert [score.label for score in (await classifying).scores] == ["b", "a"]
            embedding = asyncio.create_task(asyncio.to_thread(client.embed, "py", ["x"]))
            worker.emit(await worker.next_assignment(), finish=1, embedding=[1.0])
            assert (await embedding).vectors == ((1.0,),)
            assert not await asyncio.to_thread(client.cancel, "nothing")
            with pytest.raises(ModelNotFound):
                await asyncio.to_thread(client.embed, "none", ["x"])


async def test_without_any_gateway_a_call_fails_in_its_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with TriremeClient([address], retry_s=0.3) as client:
        with pytest.raises(ServiceUnavailable):
            await client.list_models()
        with pytest.raises(ServiceUnavailable):
            assert [event async for event in client.generate("py", "x")] == []
    with SyncTriremeClient([address], retry_s=0.3) as sync, pytest.raises(ServiceUnavailable):
        list(sync.generate("py", "x"))
