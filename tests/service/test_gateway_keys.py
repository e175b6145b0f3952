"""API keys: nothing answers without one, tenants never meet, keys come and go while the gateway runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.service.gateway_fleet import FakeWorker, Fleet, fleet
from tests.service.reflected_methods import reflected_methods
from trireme.client import Delta, Sampling, Summary, TriremeClient
from trireme.errors import InvalidApiKey, InvalidConfiguration, PermissionDenied
from trireme.gateway.identity import OPEN_PATHS, gate_of
from trireme.gateway.openai_api.app import openai_app
from trireme.gateway.process import Gateway
from trireme.gateway.settings import Settings
from trireme.runtime.tenant_keys import KeyBook, key_digest, new_key

ACME, RIVAL, SCRAPER = new_key(), new_key(), new_key()
HEALTH = "grpc.health.v1.Health"


def keys_file(path: Path, **more: str) -> Path:
    def tenant(key: str, **rest: Any) -> dict[str, Any]:
        return {"keys": [{"id": "one", "sha256": key_digest(key)}], **rest}

    tenants = {
        "acme": tenant(ACME),
        "rival": tenant(RIVAL, weight=2.5),
        "prometheus": tenant(SCRAPER, roles=["metrics"]),
        **{name: tenant(key) for name, key in more.items()},
    }
    path.write_text(yaml.safe_dump({"tenants": tenants}))
    return path


class World:
    def __init__(
        self, made: Fleet, gateway: Gateway, file: Path, http: aiohttp.ClientSession, app: web.Application
    ) -> None:
        self.worker: FakeWorker = made.workers[0]
        self.fleet, self.gateway, self.file, self.http, self.app = made, gateway, file, http, app

    async def status(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, Any], Any]:
        url = f"http://{self.gateway.http_address}{path}"
        async with self.http.request(method, url, headers=headers) as response:
            is_json = "json" in response.headers.get("content-type", "")
            return response.status, await response.json() if is_json else {}, response.headers

    def client(self, key: str) -> TriremeClient:
        return TriremeClient([self.gateway.grpc_address], api_key=key, retry_s=60.0)


@pytest.fixture
async def world(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    apps: list[web.Application] = []

    def remembered(*args: Any) -> web.Application:
        apps.append(openai_app(*args))
        return apps[-1]

    monkeypatch.setattr("trireme.gateway.openai_api.app.openai_app", remembered)
    file = keys_file(tmp_path / "keys.yaml")
    async with (
        fleet(redis_url, tmp_path) as made,
        made.gateway(keys=file) as gateway,
        aiohttp.ClientSession() as http,
    ):
        yield World(made, gateway, file, http, apps[0])


def all_routes(app: web.Application) -> list[tuple[str, str]]:
    """Every method and path of the server, with something in place of their variables."""
    found = set()
    for route in app.router.routes():
        info = route.resource.get_info() if route.resource is not None else {}
        path = info.get("path") or info.get("formatter") or info.get("prefix", "/")
        found.add((route.method, path.replace("{", "").replace("}", "")))
    return sorted(found)


async def test_every_route_refuses_without_a_key(world: World) -> None:
    routes = all_routes(world.app)
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/responses")} <= set(routes)
    for method, path in [*routes, ("GET", "/v1/nothing"), ("DELETE", "/"), ("OPTIONS", "/v1/models")]:
        if path in OPEN_PATHS:
            assert (await world.status(method, path))[0] in (200, 503)
            continue
        method = "GET" if method == "*" else method
        for headers in ({}, {"Authorization": "Bearer " + new_key()}, {"x-api-key": "x" * 400}):
            status, body, answer = await world.status(method, path, **headers)
            assert status == 401, (method, path)
            assert answer["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert body["error"]["code"] == "invalid_api_key"
    assert len(OPEN_PATHS) == 3, "a path that opens without a key: is that meant?"


async def test_every_rpc_refuses_without_a_key(world: World) -> None:
    async with grpc.aio.insecure_channel(world.gateway.grpc_address) as channel:
        methods = await reflected_methods(channel, ("authorization", f"Bearer {ACME}"))
    assert "/trireme.wire.inference.v1.Inference/Generate" in methods
    assert any("ServerReflection" in method for method in methods)
    async with grpc.aio.insecure_channel(world.gateway.grpc_address) as channel:
        for method in [*methods, "/no.such.Service/Method"]:
            if method.startswith(f"/{HEALTH}/"):
                continue
            for metadata in (None, (("authorization", f"Bearer {new_key()}"),)):
                call = channel.stream_stream(method)(metadata=metadata)
                await call.done_writing()
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call.read()
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status


async def test_a_key_opens_what_its_roles_say(world: World) -> None:
    assert (await world.status("GET", "/v1/models", Authorization=f"Bearer {ACME}"))[0] == 200
    assert (await world.status("GET", "/v1/models", **{"x-api-key": ACME}))[0] == 200
    assert (await world.status("GET", "/metrics", Authorization=f"bearer {SCRAPER}"))[0] == 200
    for path, key in (("/metrics", ACME), ("/v1/models", SCRAPER)):
        status, body, _ = await world.status("GET", path, Authorization=f"Bearer {key}")
        assert (status, body["error"]["code"]) == (403, "permission_denied")
    async with world.client(SCRAPER) as client:
        with pytest.raises(PermissionDenied):
            await client.list_models()
    async with world.client("") as client:
        with pytest.raises(InvalidApiKey):
            await client.list_models()
    official = openai.AsyncOpenAI(
        base_url=f"http://{world.gateway.http_address}/v1", api_key=new_key(), max_retries=0
    )
    with pytest.raises(openai.AuthenticationError):
        await official.models.list()
    await official.close()


async def test_equal_ids_of_two_tenants_are_two_requests(world: World) -> None:
    prompt = [index % 4000 for index in range(64)]

    async def ask(client: TriremeClient, request_id: str) -> list[Any]:
        sampling = Sampling(max_tokens=8)
        return [event async for event in client.generate("py", prompt, sampling, request_id=request_id)]

    async with world.client(ACME) as acme, world.client(RIVAL) as rival:
        first = asyncio.create_task(ask(acme, "job-1"))
        mine = await world.worker.next_assignment()
        assert (mine.request.tenant, mine.request.request_id) == ("acme", "job-1@acme")

        # Another tenant's cancel of that id finds nothing, and its call is a request of its own.
        assert await rival.cancel("job-1") is False
        second = asyncio.create_task(ask(rival, "job-1"))
        theirs = await world.worker.next_assignment()
        assert (theirs.request.tenant, theirs.request.request_id) == ("rival", "job-1@rival")
        assert (mine.request.tenant_weight, theirs.request.tenant_weight) == (1.0, 2.5)
        assert mine.request.kv_salt != theirs.request.kv_salt
        assert not set(blocks(mine.request)) & set(blocks(theirs.request))

        world.worker.answer(mine, [11, 12])
        world.worker.answer(theirs, [21, 22, 23])
        tokens = []
        for task in (first, second):
            events = await task
            assert isinstance(events[-1], Summary)
            tokens.append([t for event in events if isinstance(event, Delta) for t in event.token_ids])
        assert tokens == [[11, 12], [21, 22, 23]]

        third = asyncio.create_task(ask(acme, "job-2"))
        await world.worker.next_assignment()
        assert await acme.cancel("job-2") is True
        third.cancel()
        for named in ("job-2@acme", "job-1@acme"):
            with pytest.raises(Exception, match="request id"):
                await rival.cancel(named)


async def test_what_one_tenant_stored_no_other_finds(world: World) -> None:
    base = f"http://{world.gateway.http_address}/v1"
    mine, theirs = ({"Authorization": f"Bearer {key}"} for key in (ACME, RIVAL))
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b'{"a": 1}\n', filename="a.jsonl")
    async with world.http.post(f"{base}/files", data=form, headers=mine) as response:
        assert response.status == 200
        file_id = (await response.json())["id"]
    asked = {"model": "py", "input": "hi", "background": True, "max_output_tokens": 4}
    async with world.http.post(f"{base}/responses", json=asked, headers=mine) as response:
        assert response.status == 200
        response_id = (await response.json())["id"]

    for method, path in (
        ("GET", f"files/{file_id}"),
        ("GET", f"files/{file_id}/content"),
        ("DELETE", f"files/{file_id}"),
        ("GET", f"responses/{response_id}"),
        ("GET", f"responses/{response_id}?stream=true"),
        ("GET", f"responses/{response_id}/input_items"),
        ("POST", f"responses/{response_id}/cancel"),
        ("DELETE", f"responses/{response_id}"),
    ):
        async with world.http.request(method, f"{base}/{path}", headers=theirs) as response:
            assert response.status == 404, (method, path)
    batch = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    async with world.http.post(f"{base}/batches", json=batch, headers=theirs) as response:
        assert response.status in (400, 404) and file_id in (await response.json())["error"]["message"]
    onward = asked | {"previous_response_id": response_id, "background": False}
    async with world.http.post(f"{base}/responses", json=onward, headers=theirs) as response:
        assert response.status in (400, 404)
        assert (await response.json())["error"]["code"] == "previous_response_not_found"
    async with world.http.get(f"{base}/files", headers=theirs) as response:
        assert (await response.json())["data"] == []
    for path in (f"files/{file_id}", f"responses/{response_id}"):
        async with world.http.get(f"{base}/{path}", headers=mine) as response:
            assert response.status == 200, path


def blocks(request: Any) -> list[bytes]:
    return [request.prefix_hashes[at : at + 16] for at in range(0, len(request.prefix_hashes), 16)]


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.1)


async def test_keys_come_and_go_without_a_restart(world: World, tmp_path: Path) -> None:
    fresh = new_key()

    async def opens(key: str) -> bool:
        return (await world.status("GET", "/v1/models", Authorization=f"Bearer {key}"))[0] == 200

    assert not await opens(fresh)
    # As a mounted Kubernetes secret changes: a link is turned to another file.
    keys_file(tmp_path / "v2.yaml", newcomer=fresh)
    (tmp_path / "link").symlink_to("v2.yaml")
    (tmp_path / "link").replace(world.file)
    await until(lambda: opens(fresh), "the new key")
    assert await opens(ACME)

    (tmp_path / "v2.yaml").write_text("tenants: {acme: {keys: [{id: one, sha256: nonsense}]}}")
    await asyncio.sleep(1.5)
    assert await opens(fresh) and await opens(ACME)

    async def withdrawn() -> bool:
        return not await opens(ACME)

    (tmp_path / "v2.yaml").write_text("tenants: {}")
    await until(withdrawn, "the old key")
    assert not await opens(fresh)


async def test_a_call_that_passed_no_gate_has_no_tenant() -> None:
    from trireme.gateway.openai_api.incoming import caller_of

    with pytest.raises(LookupError):
        caller_of(make_mocked_request("POST", "/v1/completions"), b"", Settings(fleet=Path("none")))


def test_a_gateway_that_others_reach_is_open_only_where_that_is_said(tmp_path: Path) -> None:
    def settings(**changes: Any) -> Settings:
        return Settings(fleet=Path("none"), **changes)

    assert gate_of(settings()).book is None
    assert gate_of(settings(http_listen="[::1]:80")).book is None
    for listen in ("0.0.0.0:80", "[::]:80", ":80", "10.1.2.3:80", "gateway:80"):
        for which in ("http_listen", "grpc_listen"):
            with pytest.raises(InvalidConfiguration, match="keys file"):
                gate_of(settings(**{which: listen}))
            assert gate_of(settings(allow_anonymous=True, **{which: listen})).book is None
    file = keys_file(tmp_path / "keys.yaml")
    assert isinstance(gate_of(settings(keys=file, http_listen="0.0.0.0:80")).book, KeyBook)
    for clash in ("allow_anonymous", "trust_tenant_header"):
        with pytest.raises(InvalidConfiguration, match="known by their keys"):
            gate_of(settings(keys=file, **{clash: True}))
