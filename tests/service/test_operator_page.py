"""The page for operators: what it says is what the fleet says, to those who may know, in a real browser."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.service.chromium import chromium_binary, page_at
from tests.service.gateway_fleet import FakeWorker, Fleet, fleet
from trireme.errors import InvalidConfiguration
from trireme.gateway.operator_page.history import PERIOD_S, SPAN_S, History
from trireme.gateway.process import Gateway
from trireme.runtime.tenant_keys import key_digest, new_key
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

LOCAL = {"operator_listen": "127.0.0.1:0", "trust_tenant_header": True}
HOSTILE = "<img/src=x/onerror=alert(1)>"


@pytest.fixture
async def made(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(redis_url, tmp_path) as found:
        yield found


async def answered(gateway: Gateway, worker: FakeWorker, request_id: str, **headers: str) -> None:
    """One request and its answer of three tokens."""
    url, body = f"http://{gateway.http_address}/v1/completions", {"model": "py", "prompt": [9, 8, 7]}
    async with aiohttp.ClientSession() as session:
        call = asyncio.create_task(
            session.post(url, json=body, headers={"x-request-id": request_id, **headers})
        )
        worker.answer(await worker.next_assignment(), [5, 6, 7])
        response = await call
        assert response.status == 200, await response.text()


async def asked(gateway: Gateway, path: str, **headers: str) -> tuple[int, Any, Any]:
    url = f"http://{gateway.operator_address}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text(), response.headers


async def seen(gateway: Gateway, is_shown: Callable[[Any], bool]) -> Any:
    """The first picture of which that is true."""
    async with asyncio.timeout(60):
        while not is_shown(now := (await asked(gateway, "/api/now"))[1]):
            await asyncio.sleep(0.1)
    return now


async def test_it_tells_the_fleet_and_where_a_requests_time_went(made: Fleet) -> None:
    async with made.gateway(**LOCAL) as gateway:
        await answered(gateway, made.workers[0], "one")
        await answered(gateway, made.workers[0], "two")
        now = await seen(
            gateway, lambda now: {p["service"] for p in now["processes"]} >= {"worker", "gateway"}
        )
        assert now["bus"] == "answers" and now["gateway"] == gateway.gateway_id
        assert [(w["id"], w["variants"][0]["variant"]) for w in now["workers"]] == [("w1", "py-1m")]
        _, page, headers = await asked(gateway, "/")
        assert "<title>Trireme</title>" in page and "default-src 'none'" in headers["Content-Security-Policy"]
        async with asyncio.timeout(60):  # A request is told of when it has ended, after its answer.
            while len((await asked(gateway, "/api/requests"))[1]) < 2:
                await asyncio.sleep(0.02)
        _, lines, _ = await asked(gateway, "/api/requests")
        assert [line["request_id"].split("-")[0] for line in lines] == ["two", "one"]
        assert {line["completion_tokens"] for line in lines} == {3}
        _, line, _ = await asked(gateway, f"/api/requests/{lines[0]['request_id']}")
        assert line["outcome"] == "ok" and line["worker_id"] == "w1"
        spent = sum(phase["end_unix_s"] - phase["start_unix_s"] for phase in line["phases"])
        assert spent == pytest.approx(line["end_unix_s"] - line["start_unix_s"], abs=1e-6)
        assert (await asked(gateway, "/api/requests/nobody"))[0] == 404
        assert (await asked(gateway, "/api/history?since_unix_s=x"))[0] == 400
        assert (await asked(gateway, "/v1/models"))[0] == 404


async def test_a_service_that_does_not_answer_is_shown_as_silent(made: Fleet) -> None:
    gone = ProcessRecord(id="store", service="kvstore", node="n", grpc_address="127.0.0.1:9", healthy=True)
    registry = made.workers[0].registry
    async with made.gateway(**LOCAL) as gateway, registry.membership(lambda: gone):
        # On a busy machine its silence may be told before its refusal is.
        now = await seen(gateway, lambda now: [s["silent"] for s in now["stores"]] == ["UNAVAILABLE"])
        assert [store["node"] for store in now["stores"]] == ["n"]


async def test_with_keys_it_is_for_administrators(made: Fleet, tmp_path: Path) -> None:
    boss, tenant = new_key(), new_key()
    file = tmp_path / "keys.yaml"
    tenants = {
        "ops": {"keys": [{"id": "k", "sha256": key_digest(boss)}], "roles": ["admin"]},
        "acme": {"keys": [{"id": "k", "sha256": key_digest(tenant)}]},
    }
    file.write_text(yaml.safe_dump({"tenants": tenants}))

    def password(key: str) -> str:
        return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()

    async with made.gateway(operator_listen="127.0.0.1:0", keys=file) as gateway:
        for path in ("/", "/page.js", "/api/now", "/api/history", "/api/requests", "/nowhere"):
            status, _, headers = await asked(gateway, path)
            assert status == 401 and headers["WWW-Authenticate"].startswith("Basic")
            for wrong in ("Basic !", "Bearer", password("x")):
                assert (await asked(gateway, path, Authorization=wrong))[0] == 401
            assert (await asked(gateway, path, Authorization=password(tenant)))[0] == 403
        assert (await asked(gateway, "/", Authorization=password(boss)))[0] == 200
        assert (await asked(gateway, "/api/now", Authorization=f"Bearer {boss}"))[0] == 200


async def test_without_keys_it_is_for_this_machine(made: Fleet) -> None:
    async with made.gateway(**LOCAL) as gateway:
        assert (await asked(gateway, "/api/now", Host="evil.example"))[0] == 403
        assert (await asked(gateway, "/api/now", Host="localhost:1"))[0] == 200
    with pytest.raises(InvalidConfiguration, match="keys"):
        async with made.gateway(operator_listen="0.0.0.0:0"):
            pass


def test_the_hour_is_bounded_and_a_restarted_worker_gives_no_negative_rate() -> None:
    history = History()
    for number in range(2000):
        tokens = 100.0 * number if number < 1990 else 5.0
        history.add(PERIOD_S * number, {"decode_tokens": tokens, "draw_w": 1.0})
    samples = history.since(0.0)
    assert len(samples) == SPAN_S / PERIOD_S
    rates = {sample["tokens_per_s"] for sample in samples}
    assert rates == {100.0 / PERIOD_S, 0.0}
    assert [sample["at_unix_s"] for sample in history.since(PERIOD_S * 1997)] == [
        PERIOD_S * 1998,
        PERIOD_S * 1999,
    ]


@pytest.mark.skipif(chromium_binary() is None, reason="there is no Chromium here")
async def test_a_browser_shows_it_and_a_tenants_name_stays_text(made: Fleet, tmp_path: Path) -> None:
    async with made.gateway(**LOCAL) as gateway:
        await answered(gateway, made.workers[0], "shown", **{"x-trireme-tenant": HOSTILE})
        async with page_at(f"http://{gateway.operator_address}/", tmp_path / "profile") as page:
            await page.until(
                "document.querySelectorAll('#workers tbody tr').length == 1"
                " && document.querySelector('#headline').className"
            )
            row = "document.querySelector('#requests tbody tr')"
            await page.until(f"{row} && {row}.cells.length > 1")
            assert await page.value(f"{row}.cells[1].textContent") == HOSTILE
            assert await page.value("document.querySelectorAll('main img').length") == 0
            await page.value(f"{row}.click()")
            await page.until("document.querySelectorAll('#waterfall .track').length > 0")
            assert await page.value("document.querySelector('#waterfall dd').textContent.startsWith('shown')")
            await page.until("document.querySelectorAll('#curves figure').length == 5")
            assert page.complaints == []
