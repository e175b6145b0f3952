"""A fleet that is behind says no early, in the client's words, and with a time that can be believed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import grpc
import pytest

from tests.service.gateway_fleet import PATIENT, FakeWorker, Fleet, fleet
from trireme.gateway.process import Gateway
from trireme.gateway.submission import fleet_request_id
from trireme.policies.brown_out import Level
from trireme.wire.inference.v1 import inference_pb2 as wire
from trireme.wire.inference.v1.inference_pb2_grpc import InferenceStub

GOALS = "slo: {interactive: {ttft_s: 1}, standard: {ttft_s: 5}, batch: {ttft_s: 1000}}"
SLOW = {"max_sequences": 1, "decode_tokens_per_s": 10.0, "prefill_tokens_per_s": 1000.0}
"""About ten tokens a second, so that a request of 16 tokens takes one and a half."""


@pytest.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(redis_url, tmp_path, workers=0) as made:
        made.fleet_file.write_text(made.fleet_file.read_text().replace(PATIENT, GOALS))
        made.scheduler.holding.set()
        yield made


class Clients:
    """Both front ends of one gateway; answers are not waited for."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        self.gateway = gateway
        self._url = f"http://{gateway.http_address}/v1/completions"
        self._http = http
        self._stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []

    async def grpc(self, tenant: str, **fields: Any) -> grpc.aio.AioRpcError | None:
        """None where the request was accepted."""
        sampling = wire.SamplingParameters(
            max_tokens=fields.pop("max_tokens", 16), **fields.pop("sampling", {})
        )
        request = wire.GenerateRequest(model="py", text="x", sampling=sampling, **fields)
        call = self._stub.Generate(request, metadata=(("x-trireme-tenant", tenant),), timeout=600)
        try:
            first = await anext(aiter(call))
        except grpc.aio.AioRpcError as error:
            return error
        assert first.HasField("accepted")
        self.calls.append(call)
        return None

    async def http(self, tenant: str, **body: Any) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Of a request that is refused."""
        headers = {"x-trireme-tenant": tenant, **body.pop("headers", {})}
        async with self._http.post(
            self._url, json={"model": "py", "prompt": "x", "max_tokens": 16, **body}, headers=headers
        ) as response:
            return response.status, await response.json(), response.headers

    async def flood(self, tenant: str, **fields: Any) -> grpc.aio.AioRpcError:
        """Ask until the fleet says no."""
        for _ in range(200):
            refused = await self.grpc(tenant, **fields)
            if refused is not None:
                return refused
        raise AssertionError("200 requests were taken")


@pytest.fixture
async def clients(world: Fleet) -> AsyncIterator[Clients]:
    async with (
        slow_worker(world),
        world.gateway(trust_tenant_header=True, retry_after_s=0.2, brown_out_answer_tokens=32) as gateway,
        aiohttp.ClientSession() as http,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        await until(lambda: gateway.core.admission.knows_workers)
        yield Clients(gateway, http, channel)


class slow_worker:
    def __init__(self, world: Fleet, **figures: float) -> None:
        self._world, self._figures = world, {**SLOW, **figures}

    async def __aenter__(self) -> FakeWorker:
        FakeWorker.figures = self._figures
        return await self._world.add_worker("w1")

    async def __aexit__(self, *_: object) -> None:
        FakeWorker.figures = {}


async def until(condition: Any, *, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {str(key): str(value) for key, value in error.trailing_metadata()}  # type: ignore[misc]


async def test_who_floods_is_refused_and_who_does_not_is_served(
    world: Fleet, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long the calls take: what is refused in this part is refused in one moment.
    moment_s = time.monotonic()
    stopped_clock = SimpleNamespace(monotonic=lambda: moment_s, time=time.time)
    monkeypatch.setattr("trireme.gateway.admission.time", stopped_clock)
    refused = await clients.flood("flood")
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers(refused)["trireme-error-code"] == "rate_limit_exceeded"
    assert 200 <= int(trailers(refused)["retry-after-ms"]) <= 60_000
    assert "its class may wait 5 s" in (refused.details() or "")
    taken = len(clients.calls)
    assert 2 <= taken <= 8  # five seconds of work and what is under way

    status, answer, headers = await clients.http("flood")
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert headers["x-should-retry"] == "true"
    assert 0 < int(headers["retry-after-ms"]) <= 1000 * int(headers["retry-after"]) <= 60_000
    # The same room is not promised twice.
    assert int(headers["retry-after-ms"]) > int(trailers(refused)["retry-after-ms"])

    monkeypatch.undo()

    assert await clients.grpc("other") is None
    assert await clients.grpc("flood", slo_class=wire.SLO_CLASS_BATCH) is None
    metrics = clients.gateway.core.metrics.registry
    labels = {"reason": "first_token_goal"}
    assert metrics.get_sample_value("trireme_gateway_refused_total", labels) == 2

    world.scheduler.holding.clear()
    await until(lambda: len(world.scheduler.seen) == taken + 2)
    for _ in range(taken + 2):
        world.workers[0].answer(await world.workers[0].next_assignment(), [5])
    for call in clients.calls:
        assert [event async for event in call][-1].HasField("summary")

    async def admitted() -> bool:
        return await clients.grpc("flood") is None

    async with asyncio.timeout(60):
        while not await admitted():
            await asyncio.sleep(0.1)


async def test_what_cannot_end_before_its_deadline_is_refused_at_once(clients: Clients) -> None:
    call = clients._stub.Generate(
        wire.GenerateRequest(
            model="py", text="x", sampling=wire.SamplingParameters(max_tokens=1000, ignore_eos=True)
        ),
        timeout=20,
    )
    with pytest.raises(grpc.aio.AioRpcError, match="after the request's deadline") as refused:
        await anext(aiter(call))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_without_a_worker_urgent_requests_get_503_and_others_wait(
    world: Fleet, clients: Clients
) -> None:
    assert await clients.grpc("before") is None
    await world.workers[0].leave(clients.gateway)
    world.workers.clear()
    refused = None
    async with asyncio.timeout(60):
        while refused is None:
            await asyncio.sleep(0.1)
            refused = await clients.grpc("t", slo_class=wire.SLO_CLASS_INTERACTIVE)
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert int(trailers(refused)["retry-after-ms"]) >= 1000
    status, answer, headers = await clients.http("t", headers={"x-trireme-slo-class": "interactive"})
    assert (status, answer["error"]["code"]) == (503, "service_unavailable")
    assert int(headers["retry-after"]) >= 1 and headers["x-should-retry"] == "true"
    assert await clients.grpc("t", slo_class=wire.SLO_CLASS_BATCH) is None


async def test_a_request_that_was_admitted_is_no_new_work(world: Fleet, clients: Clients) -> None:
    assert await clients.grpc("flood", request_id="mine") is None
    await clients.flood("flood")
    async with (
        world.gateway(trust_tenant_header=True) as other,
        grpc.aio.insecure_channel(other.grpc_address) as channel,
    ):
        await until(lambda: other.core.admission.knows_workers)
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        sampling = wire.SamplingParameters(max_tokens=16)
        request = wire.GenerateRequest(model="py", text="x", sampling=sampling, request_id="mine")
        first = await anext(
            aiter(stub.Generate(request, metadata=(("x-trireme-tenant", "flood"),), timeout=60))
        )
        assert first.accepted.attached


async def test_a_brown_out_gives_up_extras_before_it_refuses_everybody(
    world: Fleet, clients: Clients
) -> None:
    admission = clients.gateway.core.admission
    await clients.flood("flood")
    await until(lambda: admission.level("py") is Level.ESSENTIAL)
    batch = await clients.grpc("other", slo_class=wire.SLO_CLASS_BATCH)
    assert batch is not None and "batch class" in (batch.details() or "")
    several = await clients.grpc("other", sampling={"n": 2})
    assert several is not None and "ask without" in (several.details() or "")
    metrics = clients.gateway.core.metrics.registry
    assert metrics.get_sample_value("trireme_gateway_refused_total", {"reason": "brown_out"}) == 2
    assert metrics.get_sample_value("trireme_gateway_brownout_level", {"model": "py"}) == Level.ESSENTIAL
    model = clients.gateway.core.catalog.find("py")
    assert clients.gateway.core.limits.trimmed >= {model.name}
    request = wire.GenerateRequest(model="py", text="x", request_id="open")
    call = clients._stub.Generate(request, metadata=(("x-trireme-tenant", "other"),), timeout=600)
    assert (await anext(aiter(call))).HasField("accepted")
    body = await clients.gateway.core._records.body(fleet_request_id("other", "open"))
    assert body is not None and body.sampling.max_tokens == 32


async def test_what_no_worker_can_hold_is_refused_by_name(world: Fleet) -> None:
    async with (
        slow_worker(world, max_sequences=8, kv_blocks=8, block_tokens=16, host_kv_blocks=8),
        world.gateway(trust_tenant_header=True) as gateway,
        aiohttp.ClientSession() as http,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        await until(lambda: gateway.core.admission.knows_workers)
        clients = Clients(gateway, http, channel)
        status, answer, _ = await clients.http("t", max_tokens=128)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "kv_mib" in answer["error"]["message"] and answer["error"]["param"] == "max_tokens"
        assert await clients.grpc("t", max_tokens=100) is None
        several = await clients.grpc("t", max_tokens=100, sampling={"n": 3})
        assert several is not None and several.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "swap_mib" in (several.details() or "")
