"""Scheduler and worker as real processes: assignments in, each token out once, none lost."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import yaml

from tests.service.processes import service
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.request_records import WORKERS, RequestRecords, Requeue, State
from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, Event, ProcessRecord, RequestKind
from trireme.wire.inference.v1 import inference_pb2 as inference
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.wire.worker.v1 import worker_pb2_grpc as rpc

pytestmark = pytest.mark.timeout(600)

KEYS = Keys("test")
STARTS_WITHIN_S = 240.0
"""A worker imports PyTorch twice, once for its engine: seconds, or on a busy machine minutes."""
LONG = 3900
"""Tokens of an answer that is still being made when something is done about it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=127,
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@dataclass
class FakeGateway:
    """Speaks the worker's protocol as a gateway does, and remembers what it got.

    With `confirms` it confirms each answer once it has it whole; a worker that nobody confirms to soon
    takes no more requests.
    """

    address: str
    gateway_id: str = "g1"
    confirms: bool = False
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finished: dict[tuple[str, int], pb.Finished] = field(default_factory=dict)
    last: dict[str, pb.SequenceUpdate] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    lanes: dict[int, tuple[str, int]] = field(default_factory=dict)
    batches: int = 0

    async def __aenter__(self) -> FakeGateway:
        self._channel = grpc.aio.insecure_channel(self.address)
        self._call = rpc.WorkerStub(self._channel).Connect()
        await self.send(hello=pb.Hello(gateway_id=self.gateway_id))
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        self._call.cancel()
        await self._channel.close()

    async def send(self, **what: object) -> None:
        await self._call.write(pb.GatewayMessage(**what))  # type: ignore[arg-type]

    async def _read(self) -> None:
        async for batch in self._call:
            self.batches += 1
            self.unknown.extend(batch.unknown)
            for update in batch.updates:
                key = (update.request_id, update.choice)
                have = self.tokens.setdefault(key, [])
                assert update.first_index <= len(have), "a gap"
                have[update.first_index :] = list(update.token_ids)
                self.last[update.request_id] = update
                self.lanes[update.lane] = key
                if update.HasField("finished"):
                    self.finished[key] = update.finished
                    if self.confirms:
                        received = [len(have)]
                        await self.send(
                            confirm=pb.Confirm(request_id=update.request_id, received=received, complete=True)
                        )
            for lane, index, token_id in zip(batch.lanes, batch.indices, batch.token_ids, strict=True):
                have = self.tokens[self.lanes[lane]]
                assert index <= len(have), "a gap"
                have[index:] = [token_id]

    async def until(self, condition: object, *, within_s: float = 90.0) -> None:
        deadline_s = time.monotonic() + within_s
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline_s, "the worker did not get there"
            await asyncio.sleep(0.01)


@dataclass
class Bench:
    redis: object
    records: RequestRecords
    registry: Registry
    stack: ExitStack
    redis_url: str
    fleet: Path
    directory: Path

    def start_worker(self, index: int = 0):  # type: ignore[no-untyped-def]
        return self.stack.enter_context(
            service(
                "worker",
                self.directory / f"worker{index}.log",
                redis_url=self.redis_url,
                fleet=self.fleet,
                bus_prefix="test",
                index=index,
                drain_s=60,
            )
        )

    async def workers(self, count: int = 1) -> list[ProcessRecord]:
        """The registered workers, once `count` of them are ready."""
        deadline_s = time.monotonic() + STARTS_WITHIN_S
        while True:
            found = [record for record in await self.registry.living("worker") if record.healthy]
            if len(found) >= count:
                return found
            logs = "\n".join(path.read_text()[-2000:] for path in self.directory.glob("*.log"))
            assert time.monotonic() < deadline_s, f"no worker is ready:\n{logs}"
            await asyncio.sleep(0.05)

    async def admit(self, name: str, *, prompt: list[int], model: str = "small", **sampling: object) -> None:
        sampling = {"max_tokens": 16, "temperature": 0.0, "seed": 1, **sampling}
        request = AdmittedRequest(
            request_id=name,
            tenant="t",
            model=model,
            kind=RequestKind.REQUEST_KIND_GENERATE,
            prompt_token_ids=prompt,
            sampling=inference.SamplingParameters(**sampling),  # type: ignore[arg-type]
            gateway_id="g1",
            kv_salt=b"t",
            attempt=1,
            admitted_unix_s=time.time(),
        )
        await self.records.admit(request, max_waiting=1000)

    async def until_scheduled_among(self, count: int) -> None:
        """Return when the scheduler chooses among so many workers: it sees them a moment later."""
        for number in range(8):
            await self.admit(f"probe{number}", prompt=[1], max_tokens=1)
            while not (decisions := await self.records.decisions(f"probe{number}")):
                await asyncio.sleep(0.01)
            if len(decisions[-1].candidates) == count:
                return
            await asyncio.sleep(0.1 * 2**number)
        raise AssertionError("the scheduler does not see all workers")

    async def state(self, name: str) -> State | None:
        standing = await self.records.standing(name)
        return standing.state if standing else None


@pytest.fixture
async def bench(redis_url: str, checkpoint: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        yaml.safe_dump(
            {
                "models": {"small": {"variants": {"small-v": {"checkpoint": str(checkpoint)}}}},
                "workers": [{"name": "worker", "kv_mib": 1, "max_sequences": 8, "max_batch_tokens": 32}],
                "kvstore": {"enabled": False},
            }
        )
    )
    with ExitStack() as stack:
        stack.enter_context(
            service("scheduler", tmp_path / "scheduler.log", redis_url=redis_url, bus_prefix="test")
        )
        async with open_redis(redis_url) as redis:
            yield Bench(
                redis=redis,
                records=RequestRecords(redis, KEYS),
                registry=Registry(redis, KEYS),
                stack=stack,
                redis_url=redis_url,
                fleet=fleet,
                directory=tmp_path,
            )


def reference(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=127, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


async def test_tokens_equal_the_reference_and_the_record_ends(bench: Bench, checkpoint: Path) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    prompts = {f"r{i}": [3 + i, 5, 7, 11, 13 + i] * 5 for i in range(6)}
    async with FakeGateway(record.grpc_address) as gateway:
        for name, prompt in prompts.items():
            await bench.admit(name, prompt=prompt)
        await gateway.until(lambda: len(gateway.finished) == len(prompts))
        for name, prompt in prompts.items():
            assert gateway.tokens[name, 0] == reference(checkpoint, prompt, 16)
            assert gateway.last[name].usage.prompt_tokens == 25
            assert gateway.last[name].usage.engine_s > 0
            assert await bench.state(name) is State.ASSIGNED, "not acknowledged before it is confirmed"
            await gateway.send(confirm=pb.Confirm(request_id=name, received=[16], complete=True))
        while await bench.state("r5") is not State.FINISHED:
            await asyncio.sleep(0.01)
    assert await bench.redis.xlen(KEYS.assignments(record.id)) == 0  # type: ignore[attr-defined]
    load = await bench.redis.hgetall(KEYS.load(record.id))  # type: ignore[attr-defined]
    assert load[b"requests"] == b"0"
    events = await Stream(bench.redis, KEYS.events, Event).everything()  # type: ignore[arg-type]
    assert {e.fact.finished.request_id for e in events if e.fact.HasField("finished")} == set(prompts)


async def test_a_stop_before_the_request_and_one_during_it_both_hold(bench: Bench) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as gateway:
        await gateway.send(stop=pb.Stop(request_id="early", reason="client"))
        await gateway.send(attach=pb.Attach(request_id="nobody"))
        await gateway.until(lambda: gateway.unknown == ["nobody"])  # What was sent before it is there.
        await bench.admit("early", prompt=[1, 2, 3])
        await bench.admit("late", prompt=[1, 2, 3], max_tokens=LONG, ignore_eos=True)
        await gateway.until(lambda: len(gateway.tokens.get(("late", 0), [])) > 3)
        await gateway.send(stop=pb.Stop(request_id="late", reason="client"))
        await gateway.until(lambda: ("late", 0) in gateway.finished and ("early", 0) in gateway.finished)
        assert gateway.finished["late", 0].reason == inference.FINISH_REASON_CANCELLED
        assert len(gateway.tokens["late", 0]) < LONG
        assert gateway.tokens["early", 0] == []


async def test_another_gateway_attaches_and_gets_everything(bench: Bench, checkpoint: Path) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as first:
        await bench.admit("r", prompt=[9, 8, 7, 6], max_tokens=300, ignore_eos=True)
        await first.until(lambda: len(first.tokens.get(("r", 0), [])) > 5)
    async with FakeGateway(record.grpc_address, gateway_id="g2") as second:
        await second.send(attach=pb.Attach(request_id="nobody"))
        await second.send(attach=pb.Attach(request_id="r"))
        await second.until(lambda: ("r", 0) in second.finished)
        assert second.unknown == ["nobody"]
        assert len(second.tokens["r", 0]) == 300


async def test_a_killed_workers_requests_go_to_the_other(bench: Bench, checkpoint: Path) -> None:
    first = bench.start_worker(0)
    bench.start_worker(1)
    records = await bench.workers(2)
    victim = next(record for record in records if record.pid == first.pid)
    survivor = next(record for record in records if record.pid != first.pid)
    await bench.until_scheduled_among(2)
    async with FakeGateway(survivor.grpc_address) as gateway:
        for number in range(8):
            await bench.admit(f"r{number}", prompt=[number + 1, 5, 7], max_tokens=120, ignore_eos=True)
        await gateway.until(lambda: sum(name.startswith("r") for name, _ in gateway.tokens) >= 2)
        assert await bench.redis.xlen(KEYS.assignments(victim.id)) > 0  # type: ignore[attr-defined]
        first.kill()
        await gateway.until(lambda: all((f"r{number}", 0) in gateway.finished for number in range(8)))
        for number in range(8):
            assert gateway.tokens[f"r{number}", 0] == _continued(checkpoint, [number + 1, 5, 7], 120)


def _continued(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


async def test_sigterm_drains(bench: Bench) -> None:
    process = bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address, confirms=True) as gateway:
        await bench.admit("r", prompt=[4, 4, 4], max_tokens=200, ignore_eos=True)
        await gateway.until(lambda: len(gateway.tokens.get(("r", 0), [])) > 2)
        process.send_signal(signal.SIGTERM)
        await gateway.until(lambda: ("r", 0) in gateway.finished)
        assert len(gateway.tokens["r", 0]) == 200
        while process.poll() is None:
            await asyncio.sleep(0.05)
    assert process.returncode == 0
    assert await bench.state("r") is State.FINISHED
    log = [json.loads(line) for line in (bench.directory / "worker0.log").read_text().splitlines()]
    assert [line["left"] for line in log if line["event"] == "drained"] == [0]


async def test_a_later_attempt_on_the_only_worker_goes_on_where_the_gateway_stood(
    bench: Bench, checkpoint: Path
) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    prompt = [9, 8, 7, 6]
    async with FakeGateway(record.grpc_address) as gateway:
        await bench.admit("r", prompt=prompt, max_tokens=400, ignore_eos=True)
        await gateway.until(lambda: len(gateway.tokens.get(("r", 0), [])) > 20)
        # The gateway takes the worker for lost, though it lives, and queues the request again.
        body = await bench.records.body("r")
        assert body is not None
        body.delivered.add(ids=gateway.tokens["r", 0][:20])
        body.avoid_worker_ids.append(record.id)
        assert await bench.records.requeue(body, crashed=False) is Requeue.REQUEUED
        # The first attempt may have ended just before: the second replaces it all the same.
        await gateway.until(lambda: gateway.last["r"].attempt == 2 and gateway.last["r"].HasField("finished"))
        assert gateway.finished["r", 0].reason == inference.FINISH_REASON_LENGTH
        assert gateway.tokens["r", 0] == _continued(checkpoint, prompt, 400)
        await gateway.send(confirm=pb.Confirm(request_id="r", received=[400], complete=True))
        while await bench.state("r") is not State.FINISHED:
            await asyncio.sleep(0.01)
    assert await bench.redis.xlen(KEYS.assignments(record.id)) == 0  # type: ignore[attr-defined]
    load = await bench.redis.hgetall(KEYS.load(record.id))  # type: ignore[attr-defined]
    assert load == {b"requests": b"0", b"tokens": b"0"}


async def test_what_a_gateway_sends_amiss_harms_nobody(bench: Bench) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as gateway:
        request = AdmittedRequest(
            request_id="odd",
            tenant="t",
            model="small",
            prompt_token_ids=[1],
            gateway_id="g1",
            attempt=1,
            admitted_unix_s=time.time(),
        )
        await bench.records.admit(request, max_waiting=1000)
        await gateway.until(lambda: ("odd", 0) in gateway.finished)
        assert gateway.finished["odd", 0].error_code == "invalid_request"
        await gateway.send()
        await gateway.send(hello=pb.Hello(gateway_id="again"))
        await gateway.send(stop=pb.Stop(request_id="odd", choice=2**32 - 1))
        await gateway.send(stop=pb.Stop(request_id="r", choice=0))
        await gateway.send(confirm=pb.Confirm(request_id="nobody", received=[1] * 1000, complete=True))
        await gateway.send(attach=pb.Attach(request_id=""))
        await gateway.until(lambda: gateway.unknown == [""])
        for first in (pb.GatewayMessage(), pb.GatewayMessage(hello=pb.Hello())):
            async with grpc.aio.insecure_channel(record.grpc_address) as channel:
                call = rpc.WorkerStub(channel).Connect(iter([first]))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await bench.admit("r", prompt=[1, 2, 3])
        await gateway.until(lambda: ("r", 0) in gateway.finished)
        assert gateway.finished["r", 0].reason != inference.FINISH_REASON_ERROR


async def test_an_assignment_whose_reply_was_lost_is_served(bench: Bench) -> None:
    bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as gateway:
        request = AdmittedRequest(
            request_id="r",
            model="small",
            kind=RequestKind.REQUEST_KIND_GENERATE,
            prompt_token_ids=[1, 2, 3],
            sampling=inference.SamplingParameters(max_tokens=5, temperature=0.0),
            gateway_id="g1",
            attempt=1,
        )
        assignment = Assignment(request=request, variant="small-v", worker_id=record.id)
        async with bench.redis.pipeline(transaction=True) as pipe:  # type: ignore[attr-defined]
            # In one transaction, so that this read comes before the worker's own.
            pipe.xadd(KEYS.assignments(record.id), {b"f": assignment.SerializeToString()})
            pipe.xreadgroup(WORKERS, record.id, {KEYS.assignments(record.id): ">"})
            replies = await pipe.execute()
        assert replies[1], "the server counts it as read by the worker"
        await gateway.until(lambda: ("r", 0) in gateway.finished)


async def test_an_idle_variant_is_unloaded_without_a_request_noticing(bench: Bench) -> None:
    bench.start_worker(0)
    bench.start_worker(1)
    first, second = await bench.workers(2)
    async with (
        FakeGateway(first.grpc_address, confirms=True) as one,
        FakeGateway(second.grpc_address, confirms=True) as other,
        grpc.aio.insecure_channel(first.grpc_address) as channel,
    ):
        unloading = rpc.WorkerStub(channel).UnloadVariant(pb.UnloadVariantRequest(variant="small-v"))
        for number in range(10):
            await bench.admit(f"r{number}", prompt=[number + 1, 2], max_tokens=4, ignore_eos=True)
            await asyncio.sleep(0.03)
        await unloading
        await other.until(lambda: len(one.finished) + len(other.finished) == 10)
        reasons = {finished.reason for g in (one, other) for finished in g.finished.values()}
        assert reasons == {inference.FINISH_REASON_LENGTH}
