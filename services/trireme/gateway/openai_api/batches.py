"""/v1/batches: many calls at once, when there is room for them."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated, Literal

from aiohttp import web
from pydantic import Field

from trireme.errors import InvalidRequest, ObjectNotFound
from trireme.gateway.background_work import BackgroundWork
from trireme.gateway.batch_store import BatchStore, StoredBatch
from trireme.gateway.file_store import FileStore
from trireme.gateway.openai_api.answers import BatchObject, ObjectPage
from trireme.gateway.openai_api.bodies import MAX_MAP_ENTRIES, Strict, bounded
from trireme.gateway.openai_api.files import LEAST_TTL_S
from trireme.gateway.openai_api.incoming import REQUEST_ID, caller_of, parsed, read_body
from trireme.gateway.openai_api.listing import PAGING, kept, page_of, query_of
from trireme.gateway.openai_api.metadata import check_metadata
from trireme.gateway.openai_api.openapi import PAGING_QUERY, described
from trireme.gateway.settings import Settings

WINDOW_S = 24 * 3600


class OutputExpiry(Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_TTL_S, le=30 * 24 * 3600)]


class BatchBody(Strict):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, str], bounded(MAX_MAP_ENTRIES)] | None = None
    output_expires_after: OutputExpiry | None = None


class BatchesApi:
    """The handlers."""

    def __init__(
        self, settings: Settings, batches: BatchStore, files: FileStore, background: BackgroundWork
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._background = background

    def routes(self) -> list[web.RouteDef]:
        """What the server answers to."""
        return [
            web.post("/v1/batches", self.create),
            web.get("/v1/batches", self.list),
            web.get("/v1/batches/{batch_id}", self.retrieve),
            web.post("/v1/batches/{batch_id}/cancel", self.cancel),
        ]

    @described("Run a file's calls when there is room.", body=BatchBody, answer=BatchObject)
    async def create(self, request: web.Request) -> web.Response:
        raw = await read_body(request, self._settings)
        body = await parsed(BatchBody, raw)
        check_metadata(body.metadata)
        caller = caller_of(request, raw, self._settings)
        request[REQUEST_ID] = request[REQUEST_ID] or caller.request_id
        try:
            file = await kept(self._files.load(body.input_file_id, caller.tenant))
        except ObjectNotFound as error:
            raise InvalidRequest(error.message, param="input_file_id") from None
        if file.purpose != "batch":
            raise InvalidRequest("the file's purpose must be batch", param="input_file_id")
        now = int(time.time())
        most_s = self._files.ttl_s
        about = {
            "endpoint": body.endpoint,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "metadata": body.metadata,
            "created_at": now,
            "expires_at": now + WINDOW_S,
            "output_ttl_s": min(body.output_expires_after.seconds, most_s)
            if body.output_expires_after
            else most_s,
        }
        # A retried call has the same id, and finds the batch that it made.
        digest = hashlib.blake2b(f"{caller.tenant}\0{caller.request_id}".encode(), digest_size=16)
        batch_id = f"batch_{digest.hexdigest()}"
        if await kept(self._batches.open(batch_id, caller.tenant, about)):
            await kept(self._background.start(batch_id))
        batch = await kept(self._batches.load(batch_id, caller.tenant))
        return web.json_response(batch.shown())

    @described("List batches.", answer=ObjectPage, query=PAGING_QUERY)
    async def list(self, request: web.Request) -> web.Response:
        query = query_of(request, PAGING)
        tenant = caller_of(request, b"", self._settings).tenant
        batches = await kept(self._batches.load_all(await kept(self._batches.ids(tenant))))
        return web.json_response(page_of([batch.shown() for batch in batches], query))

    @described("A batch as it stands.", answer=BatchObject)
    async def retrieve(self, request: web.Request) -> web.Response:
        return web.json_response((await self._named(request)).shown())

    @described("Stop a batch; what is done is given.", answer=BatchObject)
    async def cancel(self, request: web.Request) -> web.Response:
        batch = await self._named(request)
        await kept(self._batches.move(batch.batch_id, ["validating", "in_progress"], "cancelling"))
        return web.json_response((await self._named(request)).shown())

    async def _named(self, request: web.Request) -> StoredBatch:
        tenant = caller_of(request, b"", self._settings).tenant
        return await kept(self._batches.load(request.match_info["batch_id"], tenant))
