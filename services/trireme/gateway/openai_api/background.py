"""What outlives its call, put together: stored responses, and the work that runs without a client."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from aiohttp import web
from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.gateway.background_work import BackgroundWork
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.responses import ResponsesApi
from trireme.gateway.openai_api.responses_background import ResponseDriver
from trireme.gateway.response_store import ResponseStore, ShelfLimits
from trireme.gateway.settings import Settings
from trireme.gateway.work_leases import WorkLeases


class Background:
    """One gateway's part in it."""

    def __init__(
        self, redis: Redis, keys: Keys, settings: Settings, core: Generation, *, gateway_id: str
    ) -> None:
        limits = ShelfLimits(
            max_count=settings.max_responses,
            max_bytes=settings.max_response_bytes,
            max_open=settings.max_background,
            ttl_s=settings.response_ttl_s,
        )
        store = ResponseStore(redis, keys, limits)
        driver = ResponseDriver(core, store, max_request_s=settings.max_request_s)
        responses = BackgroundWork(
            WorkLeases(redis, keys, kind="responses", holder=gateway_id),
            driver.drive,
            what="response",
            most=settings.max_driven,
        )
        self._work = [responses]
        self._routes = [*ResponsesApi(settings, core, store, responses).routes()]

    def routes(self) -> list[web.RouteDef]:
        """What the HTTP server answers to for it."""
        return self._routes

    def running(self) -> list[Coroutine[Any, Any, None]]:
        """What runs as long as the gateway does."""
        return [work.run() for work in self._work]

    async def leave(self) -> None:
        """Hand what runs here to other gateways."""
        for work in self._work:
            await work.leave()
