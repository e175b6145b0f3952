"""/openapi.json is served and true: every route is in it, and what is answered is what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from aiohttp import web

import trireme.gateway.openai_api.app as app_module
from tests.service.openai_world import TEXT, World
from tests.service.openapi_checks import OpenApiChecks
from trireme.gateway.openai_api.openapi import description_route, undescribed

CHAT: dict[str, Any] = {"model": "py", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
PROMPT: dict[str, Any] = {"model": "py", "prompt": "x", "max_tokens": 50}


@pytest.fixture
async def apps(monkeypatch: pytest.MonkeyPatch) -> list[web.Application]:
    """The applications that gateways make in this test."""
    made: list[web.Application] = []

    def noted(app: web.Application) -> web.RouteDef:
        made.append(app)
        return description_route(app)

    monkeypatch.setattr(app_module, "description_route", noted)
    return made


async def test_every_route_is_described_and_answers_as_it_says(
    apps: list[web.Application], world: World
) -> None:
    (app,) = apps
    assert undescribed(app.router.routes()) == []
    async with world.http.get(world.url + "/openapi.json") as response:
        assert response.status == 200
        document = await response.json()
    schemathesis.openapi.from_dict(document).validate()
    checks = OpenApiChecks(document)
    routed = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    operations = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
    assert operations == routed

    async def ask(method: str, path: str, body: Any = None, **headers: str) -> bytes:
        async with world.http.request(method, world.url + path, json=body, headers=headers) as response:
            raw = await response.read()
            kind = response.headers["content-type"]
            checks.check(method, path, response.status, kind, raw)
            return raw

    for path in ("/openapi.json", "/metrics", "/livez", "/readyz", "/health", "/v1/models", "/v1/models/py"):
        await ask("GET", path)
    await ask("GET", "/v1/models/none")
    for path, body, told in (
        ("/v1/chat/completions", CHAT, {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", PROMPT, {"logprobs": 2}),
    ):
        for change in ({}, told, {"n": 2}):
            serving = asyncio.create_task(world.serve())
            assert TEXT[:6].encode() in await ask("POST", path, {**body, **change})
            await serving
            serving = asyncio.create_task(world.serve())
            options = {"stream": True, "stream_options": {"include_usage": True}}
            events = checks.check_events(path, await ask("POST", path, {**body, **change, **options}))
            assert len(events) > 2 and events[-1]["usage"]
            await serving
        serving = asyncio.create_task(world.serve())
        options = {"include_usage": True, "continuous_usage_stats": True}
        counted = {**body, "stream": True, "stream_options": options}
        assert all(event["usage"] for event in checks.check_events(path, await ask("POST", path, counted)))
        await serving
        await ask("POST", path, {**body, "temperature": 9})
        await ask("POST", path, {**body, "model": "none"})
    for form in ("float", "base64"):
        asked = {"model": "py", "input": ["x"], "encoding_format": form}
        answering = asyncio.create_task(ask("POST", "/v1/embeddings", asked))
        world.worker.emit(await world.worker.next_assignment(), finish=1, embedding=[1.0, 0.5])
        await answering
    serving = asyncio.create_task(world.serve())
    await ask("POST", "/v1/responses", {"model": "py", "input": "x", "max_output_tokens": 50})
    await serving
    # A busy machine's fleet may miss a heartbeat: both of its answers are described.
    answered = {(m, p) for m, p, status in checks.seen if status == "200" or p in ("/readyz", "/health")}
    plain = {(m, p) for m, p in operations if "{" not in p and not p.startswith(("/v1/files", "/v1/batches"))}
    assert plain <= answered  # Calls about stored objects are held to it by their own tests' client.


def test_a_route_that_says_nothing_is_named() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/v1/new", handler), description_route(app)])
    assert undescribed(app.router.routes()) == ["GET /v1/new"]


def test_an_answer_that_is_not_described_is_found() -> None:
    operation = {"responses": {"200": {"content": {"application/json": {"schema": {"type": "object"}}}}}}
    checks = OpenApiChecks({"paths": {"/a/{b}": {"get": operation}}, "components": {}})
    checks.check("GET", "/a/1", 200, "application/json", b"{}")
    for status, kind, body in (
        (201, "application/json", b"{}"),
        (200, "text/x", b""),
        (200, "application/json", b"1"),
    ):
        with pytest.raises(AssertionError):
            checks.check("GET", "/a/1", status, kind, body)
