"""Fixtures of the tests that ask a gateway over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.service.gateway_fleet import fleet
from tests.service.openai_world import World
from tests.service.openapi_checks import CheckingTransport


@pytest.fixture
async def world(redis_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    settings = getattr(request, "param", {})
    async with (
        fleet(redis_url, tmp_path) as made,
        made.gateway(**settings) as gateway,
        AsyncOpenAI(
            base_url=f"http://{gateway.http_address}/v1",
            api_key="none",
            max_retries=0,
            timeout=90,
            http_client=DefaultAsyncHttpxClient(
                transport=CheckingTransport(f"http://{gateway.http_address}")
            ),
        ) as client,
        aiohttp.ClientSession() as http,
    ):
        yield World(made, made.workers[0], gateway, client, http)
