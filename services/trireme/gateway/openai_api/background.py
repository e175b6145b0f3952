"""What outlives its call, put together: stored responses, and the work that runs without a client."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from aiohttp import web
from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.gateway.background_work import BackgroundWork
from trireme.gateway.batch_store import BatchStore
from trireme.gateway.file_store import FileStore
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.batches import BatchesApi
from trireme.gateway.openai_api.batches_driving import BatchDriver
from trireme.gateway.openai_api.files import FilesApi
from trireme.gateway.openai_api.responses import ResponsesApi
from trireme.gateway.openai_api.responses_background import ResponseDriver
from trireme.gateway.response_store import ResponseStore
from trireme.gateway.settings import Settings
from trireme.gateway.shelves import ShelfLimits
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
        files = FileStore(
            redis,
            keys,
            ShelfLimits(
                max_count=settings.max_files,
                max_bytes=settings.max_files_bytes,
                max_open=0,
                ttl_s=settings.file_ttl_s,
                fleet_count=settings.max_fleet_files,
                fleet_bytes=settings.max_fleet_files_bytes,
            ),
        )
        stored_batches = BatchStore(
            redis,
            keys,
            ShelfLimits(
                max_count=settings.max_files,
                max_bytes=settings.max_files_bytes,
                max_open=settings.max_batches,
                ttl_s=settings.file_ttl_s,
                fleet_count=settings.max_fleet_files,
                fleet_open=settings.max_fleet_batches,
            ),
        )
        batches = BackgroundWork(
            WorkLeases(redis, keys, kind="batches", holder=gateway_id),
            BatchDriver(core, stored_batches, files, settings).drive,
            what="batch",
            most=settings.max_driven_batches,
        )
        self._work = [responses, batches]
        self._routes = [
            *ResponsesApi(settings, core, store, responses).routes(),
            *FilesApi(settings, files).routes(),
            *BatchesApi(settings, stored_batches, files, batches).routes(),
        ]

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
