"""Quotas hold over all gateways, are told in headers, and come back; the audit log tells who did what."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from redis.asyncio import Redis

from tests.service.gateway_fleet import KEYS, FakeWorker, Fleet, fleet
from trireme.client import Sampling, TriremeClient
from trireme.errors import InvalidApiKey, Overloaded
from trireme.gateway.audit import AuditLog
from trireme.gateway.process import Gateway
from trireme.gateway.quotas import Quotas
from trireme.runtime.tenant_keys import Tenant, key_digest, new_key

TENANTS: dict[str, dict[str, int]] = {
    "few": {"requests_per_minute": 4},
    "short": {"tokens_per_minute": 2000},
    "single": {"max_inflight": 1},
    "free": {},
}
KEY = {name: new_key() for name in TENANTS}
SECRET = "the launch is on tuesday"


class World:
    def __init__(self, made: Fleet, gateways: list[Gateway], http: aiohttp.ClientSession, log: Path) -> None:
        self.worker: FakeWorker = made.workers[0]
        self.redis, self.gateways, self.http, self.log = made.redis, gateways, http, log

    async def complete(self, tenant: str, gateway: int = 0, **body: Any) -> tuple[int, Any, Any]:
        url = f"http://{self.gateways[gateway].http_address}/v1/completions"
        sent = {"model": "py", "prompt": SECRET, "max_tokens": 4} | body
        headers = {"Authorization": f"Bearer {KEY[tenant]}"}
        async with self.http.post(url, json=sent, headers=headers) as response:
            return response.status, await response.json(), response.headers

    def client(self, tenant: str, key: str | None = None) -> TriremeClient:
        return TriremeClient([self.gateways[0].grpc_address], api_key=key or KEY[tenant], retry_s=5.0)

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Every request gets two tokens."""

        async def answer() -> None:
            while True:
                self.worker.answer(await self.worker.assigned.get(), [11, 12])

        task = asyncio.create_task(answer())
        try:
            yield
        finally:
            task.cancel()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[World]:
    file, log = tmp_path / "keys.yaml", tmp_path / "audit.jsonl"
    tenants = {
        name: {"keys": [{"id": f"{name}-1", "sha256": key_digest(KEY[name])}], **bounds}
        for name, bounds in TENANTS.items()
    }
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    async with (
        fleet(redis_url, tmp_path) as made,
        made.gateway(keys=file, audit_log=str(log)) as one,
        made.gateway(keys=file) as two,
        aiohttp.ClientSession() as http,
    ):
        yield World(made, [one, two], http, log)


async def test_requests_a_minute_hold_over_all_gateways_and_are_told(world: World) -> None:
    begun_s = time.monotonic()
    async with world.answering():
        asked = [world.complete("few", number % 2) for number in range(16)]
        answers = await asyncio.gather(*asked)
        free = await asyncio.gather(*(world.complete("free") for _ in range(6)))
    passed = [answer for answer in answers if answer[0] == 200]
    refused = [answer for answer in answers if answer[0] == 429]
    # A bucket of four, and what filled it meanwhile.
    most = 4 + int((time.monotonic() - begun_s) * 4 / 60)
    assert 4 <= len(passed) <= most and len(passed) + len(refused) == 16
    assert [status for status, _, _ in free] == [200] * 6
    assert "x-ratelimit-limit-requests" not in free[0][2]

    for _, body, headers in refused:
        assert body["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(headers["retry-after-ms"]) <= 15_000
        assert int(headers["retry-after"]) * 1000 >= int(headers["retry-after-ms"]) - 1000
        assert headers["x-should-retry"] == "true"
    for _, _, headers in answers:
        assert headers["x-ratelimit-limit-requests"] == "4"
        left = int(headers["x-ratelimit-remaining-requests"])
        assert 0 <= left < 4
        assert 0 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert headers["RateLimit-Policy"] == '"requests";q=4;w=60'
        assert headers["RateLimit"].startswith(f'"requests";r={left};t=')

    async with world.client("few") as client:
        with pytest.raises(Overloaded, match="4 requests a minute") as told:
            for _ in range(8):
                await client.embed("py", ["x"] * 5)
        assert told.value.retry_after_s is not None and 0 < told.value.retry_after_s <= 60


async def test_tokens_are_reserved_at_admission_and_settled_by_use(world: World) -> None:
    async def left() -> float:
        (value,) = await world.redis.hmget(KEYS.quota("short"), ["tokens"])
        return float(value or 2000)

    first = asyncio.create_task(world.complete("short", max_tokens=1500))
    assignment = await world.worker.next_assignment()
    prompt = len(assignment.request.prompt_token_ids)
    reserved = prompt + 1500
    assert await left() == pytest.approx(2000 - reserved, abs=0.01)
    world.worker.answer(assignment, [11, 12])
    status, _, headers = await first
    assert status == 200 and int(headers["x-ratelimit-limit-tokens"]) == 2000
    async with asyncio.timeout(60):
        while await left() < 2000 - prompt - 2:
            await asyncio.sleep(0.02)

    # More than a bucket is a bucket: it is taken where it is full, and then leaves nothing.
    quotas = Quotas(world.redis, KEYS, lambda: {"whole": Tenant(tokens_per_minute=1000)})
    large = await quotas.reserve("whole", 10**9)
    assert large is not None and large.tokens == 1000
    with pytest.raises(Overloaded) as told:
        await quotas.reserve("whole", 1000)
    assert told.value.retry_after_s is not None and 0 < told.value.retry_after_s <= 60
    # What was used beyond stays owed.
    await quotas.settle(large, tokens=3000)
    await quotas.settle(large, tokens=0)
    with pytest.raises(Overloaded) as told:
        await quotas.reserve("whole", 1)
    assert told.value.retry_after_s is not None and told.value.retry_after_s > 60


async def test_a_request_that_never_began_costs_nothing(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        quotas = Quotas(redis, KEYS, lambda: {"t": Tenant(requests_per_minute=1, tokens_per_minute=100)})
        for _ in range(3):
            reservation = await quotas.reserve("t", 100)
            assert reservation is not None
            await quotas.settle(reservation, tokens=None)
        assert await quotas.reserve("unknown", 100) is None


async def test_so_many_at_once_and_no_more(world: World) -> None:
    first = asyncio.create_task(world.complete("single"))
    assignment = await world.worker.next_assignment()
    status, body, _ = await world.complete("single")
    assert status == 429 and "1 of your requests" in body["error"]["message"]
    world.worker.answer(assignment, [11])
    assert (await first)[0] == 200
    async with world.answering():
        assert (await world.complete("single"))[0] == 200


async def test_the_audit_log_tells_who_did_what_and_no_log_has_text(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with world.answering():
        assert (await world.complete("free"))[0] == 200
        assert (await world.complete("free", model="none"))[0] == 404
        async with world.client("free") as client:
            async for _ in client.generate("py", SECRET, Sampling(max_tokens=4), request_id="mine"):
                pass
    async with world.client("free", key=new_key()) as client:
        with pytest.raises(InvalidApiKey):
            await client.list_models()
    url = f"http://{world.gateways[0].http_address}/v1/{SECRET.replace(' ', '-')}"
    assert (await world.http.get(url)).status == 401
    async with asyncio.timeout(60):
        while len(world.lines()) < 5:
            await asyncio.sleep(0.05)
    lines = world.lines()
    said = [(line["tenant"], line["key"], line["call"].split("/")[-1], line["outcome"]) for line in lines]
    assert said == [
        ("free", "free-1", "completions", "200"),
        ("free", "free-1", "completions", "model_not_found"),
        ("free", "free-1", "Generate", "ok"),
        ("", "", "ListModels", "invalid_api_key"),
        ("", "", "GET (no such path)", "invalid_api_key"),
    ]
    assert lines[2]["request_ids"] == ["mine@free"] and lines[2]["model"] == "py"
    assert lines[0]["answer_tokens"] == lines[2]["answer_tokens"] == 2
    assert lines[0]["prompt_tokens"] > 0 and lines[0]["requests"] == 1
    assert "127.0.0.1" in lines[2]["peer"]
    text = world.log.read_text()
    for log in (text, caplog.text, *(str(vars(record)) for record in caplog.records)):
        assert "tuesday" not in log and not any(key in log for key in KEY.values())


def test_the_audit_logs_files_are_bounded(tmp_path: Path) -> None:
    place = tmp_path / "audit.jsonl"
    log = AuditLog(str(place), max_bytes=4096, max_files=3)
    for number in range(500):
        with log.call(f"GET /{number}", peer="here"):
            pass
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size <= 4096 for file in files)
    last = json.loads(place.read_text().splitlines()[-1])
    assert last["call"] == "GET /499"
