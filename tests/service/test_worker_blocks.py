"""Histories that left the engine's memory come back from the KV store, whatever happens to the store."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from tests.service.processes import service
from tests.service.test_worker import KEYS, STARTS_WITHIN_S, FakeGateway, checkpoint  # noqa: F401  (a fixture)
from tests.service.test_worker_engine_process import engine_of
from trireme.bus.connection import open_redis
from trireme.bus.registry import Registry
from trireme.bus.request_records import RequestRecords
from trireme.kvcache.block_identity import block_hashes, tenant_root
from trireme.kvcache.store_client import StoreClient
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, ProcessRecord, RequestKind
from trireme.wire.inference.v1 import inference_pb2 as inference

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]

WITHIN_S = 90.0
BLOCK = 16
HISTORY = 384
ANSWER = 16
TURN = 16
"""New tokens of a turn."""
UNHURRIED = {"store_deadline_s": WITHIN_S, "kv_load_always": True}
"""Settings of a worker that loads whatever is stored, however busy the machine is."""
FILL = 10
"""Prompts of 480 tokens that push everything else out of the engine's memory of 256 blocks."""


class Reference:
    """Greedy continuations by another implementation."""

    def __init__(self, checkpoint: Path) -> None:  # noqa: F811
        from transformers import LlamaForCausalLM

        self._model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def answer(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else each token 0 is taken for padding
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in out[0, len(prompt) :]]


@dataclass
class Node:
    """One node: a scheduler, workers and a KV store that may be killed and started again."""

    records: RequestRecords
    registry: Registry
    stack: ExitStack
    redis_url: str
    directory: Path
    fleet: Path
    reference: Reference
    gateway: FakeGateway = field(init=False)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def start_store(self, **more: object) -> subprocess.Popen[bytes]:
        settings: dict[str, object] = {"dram_mib": 16, "ssd_mib": 0, "bus_prefix": "test", **more}
        return self.stack.enter_context(
            service(
                "kvstore",
                self.directory / "kvstore.log",
                redis_url=self.redis_url,
                directory=self.directory / "ssd",
                arena_directory=self.directory,
                **settings,
            )
        )

    def start_worker(self, index: int = 0, **more: object) -> subprocess.Popen[bytes]:
        return self.stack.enter_context(
            service(
                "worker",
                self.directory / f"worker{index}.log",
                redis_url=self.redis_url,
                fleet=self.fleet,
                bus_prefix="test",
                index=index,
                **more,
            )
        )

    async def living(self, name: str, process: subprocess.Popen[bytes]) -> ProcessRecord:
        """A process's registration, once it is ready."""
        async with asyncio.timeout(STARTS_WITHIN_S):
            while True:
                assert process.poll() is None, f"{name} ended: {self.log(name)}"
                for record in await self.registry.living(name):
                    if record.pid == process.pid and record.healthy:
                        return record
                await asyncio.sleep(0.05)

    def log(self, name: str) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.directory.glob(f"{name}*.log"))

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, 120) for _ in range(count)]

    async def admit(self, prompt: list[int], *, tenant: str, session: str = "", answer: int = ANSWER) -> str:
        name = f"r{next(self.numbers)}"
        salt = tenant_root("test", tenant)
        request = AdmittedRequest(
            request_id=name,
            tenant=tenant,
            session_id=session,
            model="small",
            kind=RequestKind.REQUEST_KIND_GENERATE,
            prompt_token_ids=prompt,
            sampling=inference.SamplingParameters(max_tokens=answer, temperature=0.0, ignore_eos=True),
            gateway_id="g1",
            kv_salt=salt,
            prefix_hashes=b"".join(block_hashes(prompt, BLOCK, salt)),
            attempt=1,
            admitted_unix_s=time.time(),
        )
        await self.records.admit(request, max_waiting=1000)
        return name

    async def answers(self, names: list[str]) -> list[list[int]]:
        await self.gateway.until(
            lambda: all((name, 0) in self.gateway.finished for name in names), within_s=WITHIN_S
        )
        return [self.gateway.tokens[name, 0] for name in names]

    async def ask(self, prompt: list[int], *, tenant: str, session: str = "") -> tuple[list[int], int]:
        """(tokens, prompt tokens found in a cache)."""
        name = await self.admit(prompt, tenant=tenant, session=session)
        [tokens] = await self.answers([name])
        return tokens, self.found(name)

    def found(self, name: str) -> int:
        return int(self.gateway.last[name].usage.cached_prompt_tokens)

    async def until_ended(self, name: str) -> None:
        """Until nobody would compute the request again were its worker gone."""
        async with asyncio.timeout(WITHIN_S):
            while (standing := await self.records.standing(name)) is not None and standing.state.is_open:
                await asyncio.sleep(0.02)

    async def push_out(self) -> None:
        """Fill the engine's memory with other things."""
        names = [await self.admit(self.tokens(480), tenant="filler", answer=1) for _ in range(FILL)]
        await self.answers(names)

    def is_right(self, prompt: list[int], tokens: list[int]) -> bool:
        return tokens == self.reference.answer(prompt)


@asynccontextmanager
async def node_of(redis_url: str, directory: Path, checkpoint: Path, **worker: int) -> AsyncIterator[Node]:  # noqa: F811
    """A scheduler, and what workers and stores need to be started."""
    fleet = directory / "fleet.yaml"
    fleet.write_text(
        yaml.safe_dump(
            {
                "models": {"small": {"variants": {"small-v": {"checkpoint": str(checkpoint)}}}},
                "workers": [{"name": "worker", **worker}],
                "block_tokens": BLOCK,
            }
        )
    )
    with ExitStack() as stack:
        stack.enter_context(
            service("scheduler", directory / "scheduler.log", redis_url=redis_url, bus_prefix="test")
        )
        async with open_redis(redis_url) as redis:
            yield Node(
                records=RequestRecords(redis, KEYS),
                registry=Registry(redis, KEYS),
                stack=stack,
                redis_url=redis_url,
                directory=directory,
                fleet=fleet,
                reference=Reference(checkpoint),
            )


@pytest.fixture
async def node(redis_url: str, checkpoint: Path, tmp_path: Path) -> AsyncIterator[Node]:  # noqa: F811
    sizes = {"kv_mib": 1, "max_sequences": 8, "max_batch_tokens": 32}
    async with node_of(redis_url, tmp_path, checkpoint, **sizes) as made:
        yield made


def stored(client: StoreClient, namespace: str, prompt: list[int], tenant: str) -> int:
    """Leading blocks of a prompt that the store has."""
    return client.match_local(namespace, list(block_hashes(prompt, BLOCK, tenant_root("test", tenant))))


async def until_stored(client: StoreClient, namespace: str, prompt: list[int], tenant: str) -> None:
    async with asyncio.timeout(WITHIN_S):
        while stored(client, namespace, prompt, tenant) < len(prompt) // BLOCK:
            await asyncio.sleep(0.02)


async def second_turns(node: Node, client: StoreClient, namespace: str) -> list[int]:
    """Conversations whose first turn left the engine go on; how many tokens each second turn found.

    Each answer is checked. Ends early where something was found.
    """
    found: list[int] = []
    for number in range(4):
        tenant, prompt = f"tenant-{number}", node.tokens(HISTORY)
        first, _ = await node.ask(prompt, tenant=tenant, session="s")
        await until_stored(client, namespace, prompt, tenant)
        await node.push_out()
        prompt = prompt + first + node.tokens(TURN)
        second, cached = await node.ask(prompt, tenant=tenant, session="s")
        assert node.is_right(prompt, second)
        found.append(cached)
        if cached:
            break
    return found


async def test_a_second_turn_finds_its_history_in_the_store_and_strangers_find_nothing(node: Node) -> None:
    store = await node.living("kvstore", node.start_store())
    worker = await node.living("worker", node.start_worker(**UNHURRIED))
    namespace = worker.worker.variants[0].kv_namespace
    async with (
        StoreClient.open(store.grpc_address) as client,
        FakeGateway(worker.grpc_address, confirms=True) as node.gateway,
    ):
        found = await second_turns(node, client, namespace)
        stats = await client.stats(deadline_s=WITHIN_S)
        assert stats is not None and stats.dram.hits >= HISTORY // BLOCK
        assert found[-1] >= HISTORY, "with the answer's full blocks the history is longer than the prompt was"
        prompt = node.tokens(HISTORY)
        await node.ask(prompt, tenant="alice")
        await until_stored(client, namespace, prompt, "alice")
        tokens, cached = await node.ask(prompt, tenant="mallory")
        assert cached == 0 and node.is_right(prompt, tokens)
        async with asyncio.timeout(WITHIN_S):
            while (stats := await client.stats()) is None or stats.leases:
                await asyncio.sleep(0.05)


async def test_what_a_restarted_store_lost_is_saved_again_and_wrong_bytes_are_misses(node: Node) -> None:
    process = node.start_store()
    first_store = await node.living("kvstore", process)
    worker = await node.living("worker", node.start_worker())
    namespace = worker.worker.variants[0].kv_namespace
    async with FakeGateway(worker.grpc_address, confirms=True) as node.gateway:
        prompt = node.tokens(HISTORY)
        async with StoreClient.open(first_store.grpc_address) as client:
            await node.ask(prompt, tenant="t", session="s")
            await until_stored(client, namespace, prompt, "t")
        process.kill()
        process.wait()
        tokens, _ = await node.ask(prompt, tenant="t", session="s")
        assert node.is_right(prompt, tokens), "the engine has it, the store is gone"
        store = await node.living("kvstore", node.start_store())
        async with StoreClient.open(store.grpc_address) as client:
            async with asyncio.timeout(WITHIN_S):
                # Blocks that are not computed again are offered when a request on them ends.
                while stored(client, namespace, prompt, "t") < HISTORY // BLOCK:
                    tokens, _ = await node.ask(prompt, tenant="t", session="s")
                    assert node.is_right(prompt, tokens)

            spoilt: list[list[int]] = []

            async def spoil(history: list[int]) -> None:
                hashes = list(block_hashes(history, BLOCK, tenant_root("test", f"tenant-{len(spoilt)}")))
                held = await client.hold(namespace, hashes, deadline_s=5.0)
                assert held is not None
                memory = client._connection._arena.memory  # type: ignore[union-attr]
                memory[held.place(3).offset + 100] ^= 1
                client.let_go(held)
                spoilt.append(history)

            found = []
            for number in range(2):
                tenant, history = f"tenant-{number}", node.tokens(HISTORY)
                first, _ = await node.ask(history, tenant=tenant)
                await until_stored(client, namespace, history, tenant)
                await node.push_out()
                await spoil(history)
                whole = history + first + node.tokens(TURN)
                tokens, cached = await node.ask(whole, tenant=tenant)
                assert node.is_right(whole, tokens)
                found.append(cached)
            assert max(found) <= 3 * BLOCK, "what follows a wrong block is computed"


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_store_that_dies_or_hangs_costs_no_answer(node: Node, fault: signal.Signals) -> None:
    process = node.start_store()
    store = await node.living("kvstore", process)
    worker = await node.living("worker", node.start_worker())
    namespace = worker.worker.variants[0].kv_namespace
    async with FakeGateway(worker.grpc_address, confirms=True) as node.gateway:
        prompts = [node.tokens(HISTORY) for _ in range(4)]
        async with StoreClient.open(store.grpc_address) as client:
            await node.answers([await node.admit(prompt, tenant="t") for prompt in prompts])
            for prompt in prompts:
                await until_stored(client, namespace, prompt, "t")
        await node.push_out()
        # Loads of these and saves of their fillers are under way when it happens.
        names = []
        for number, prompt in enumerate(prompts * 2):
            names.append(await node.admit(prompt, tenant="t"))
            names.append(await node.admit(node.tokens(HISTORY), tenant="filler", answer=1))
            if number == 1:
                await asyncio.sleep(0.02)
                process.send_signal(fault)
        await node.answers(names)
        for name, prompt in zip(names[::2], prompts * 2, strict=True):
            assert node.is_right(prompt, node.gateway.tokens[name, 0])
        if fault is signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            async with StoreClient.open(store.grpc_address) as client:
                fresh = node.tokens(HISTORY)
                await node.ask(fresh, tenant="t")
                async with asyncio.timeout(WITHIN_S):
                    while stored(client, namespace, fresh, "t") < HISTORY // BLOCK:
                        tokens, _ = await node.ask(fresh, tenant="t")
                        assert node.is_right(fresh, tokens)


async def test_an_engine_killed_while_it_saves_leaves_nothing_wrong(node: Node) -> None:
    store = await node.living("kvstore", node.start_store())
    victim_process = node.start_worker(0)
    victim = await node.living("worker", victim_process)
    async with (
        StoreClient.open(store.grpc_address) as client,
        FakeGateway(victim.grpc_address, confirms=True) as node.gateway,
    ):
        prompts = [node.tokens(HISTORY) for _ in range(4)]
        names = [await node.admit(prompt, tenant="t", answer=1) for prompt in prompts]
        await node.answers(names[:2])
        engine_of(victim_process.pid).kill()
        victim_process.wait(timeout=WITHIN_S)
        survivor = await node.living("worker", node.start_worker(1))
        namespace = survivor.worker.variants[0].kv_namespace
        async with FakeGateway(survivor.grpc_address, confirms=True) as node.gateway:
            for prompt in prompts:
                async with asyncio.timeout(WITHIN_S):
                    # What the dead engine had reserved is free again once its time is over.
                    while True:
                        tokens, _ = await node.ask(prompt, tenant="t")
                        assert node.is_right(prompt, tokens)
                        if stored(client, namespace, prompt, "t") == HISTORY // BLOCK:
                            break
                        await asyncio.sleep(0.5)
