"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError

from trireme.errors import InvalidRequest
from trireme.gateway.file_store import FileStore, StoredFile
from trireme.gateway.openai_api.answers import DeletedObject, FileObject, ObjectPage
from trireme.gateway.openai_api.incoming import caller_of
from trireme.gateway.openai_api.listing import PAGING, kept, page_of, query_of
from trireme.gateway.openai_api.openapi import PAGING_QUERY, described
from trireme.gateway.settings import Settings

FIELD_BYTES = 4096
"""A form's field that is no file."""
MAX_FIELDS = 16
UPLOADS_AT_ONCE = 4
"""Uploads that this gateway holds in memory; more wait for their turn."""
LEAST_TTL_S = 3600
_EXPIRY = re.compile(r"[0-9]{1,10}")


class FilesApi:
    """The handlers."""

    def __init__(self, settings: Settings, store: FileStore) -> None:
        self._settings = settings
        self._store = store
        self._uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)

    def routes(self) -> list[web.RouteDef]:
        """What the server answers to."""
        return [
            web.post("/v1/files", self.create),
            web.get("/v1/files", self.list),
            web.get("/v1/files/{file_id}", self.retrieve),
            web.delete("/v1/files/{file_id}", self.delete),
            web.get("/v1/files/{file_id}/content", self.content),
        ]

    @described(
        "Upload a file.",
        form={
            "file": "JSON lines, a call each.",
            "purpose": "batch.",
            "expires_after[anchor]": "created_at.",
            "expires_after[seconds]": "How long the file is kept.",
        },
        answer=FileObject,
    )
    async def create(self, request: web.Request) -> web.Response:
        tenant = caller_of(request, b"", self._settings).tenant
        async with self._uploading:
            try:
                async with asyncio.timeout(self._settings.body_s):
                    fields, data = await self._form(request)
            except TimeoutError:
                raise web.HTTPRequestTimeout(reason="the body came too slowly") from None
            filename = fields.pop("filename", "")
            purpose = fields.pop("purpose", None)
            if purpose != "batch":
                raise InvalidRequest("purpose must be 'batch'", param="purpose")
            now = int(time.time())
            file = StoredFile(
                file_id=f"file-{secrets.token_hex(16)}",
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                num_bytes=len(data),
                created_at=now,
                expires_at=now + self._ttl_s(fields),
            )
            await kept(self._store.write(file.file_id, data))
            await kept(self._store.publish(file))
        return web.json_response(file.shown())

    @described(
        "List files.", answer=ObjectPage, query={**PAGING_QUERY, "purpose": "Files of that purpose alone."}
    )
    async def list(self, request: web.Request) -> web.Response:
        query = query_of(request, (*PAGING, "purpose"))
        tenant = caller_of(request, b"", self._settings).tenant
        purpose = query.get("purpose")
        files = await kept(self._store.load_all(await kept(self._store.ids(tenant)), tenant))
        shown = [file.shown() for file in files if purpose in (None, file.purpose)]
        return web.json_response(page_of(shown, query))

    @described("A file's card.", answer=FileObject)
    async def retrieve(self, request: web.Request) -> web.Response:
        return web.json_response((await self._named(request)).shown())

    @described("Forget a file.", answer=DeletedObject)
    async def delete(self, request: web.Request) -> web.Response:
        file = await self._named(request)
        await kept(self._store.delete(file.file_id, file.tenant))
        return web.json_response({"id": file.file_id, "object": "file", "deleted": True})

    @described("What a file has.", text="application/octet-stream")
    async def content(self, request: web.Request) -> web.StreamResponse:
        file = await self._named(request)
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(file.num_bytes),
                "Content-Disposition": "attachment",
            }
        )
        await response.prepare(request)
        try:
            async for piece in self._store.read(file.file_id):
                async with asyncio.timeout(self._settings.stall_s):
                    await response.write(piece)
            await response.write_eof()
        except Exception:
            # The status is out: only a broken connection can say that this is not all.
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _named(self, request: web.Request) -> StoredFile:
        tenant = caller_of(request, b"", self._settings).tenant
        return await kept(self._store.load(request.match_info["file_id"], tenant))

    def _ttl_s(self, fields: dict[str, str]) -> int:
        anchor, seconds = (
            fields.pop("expires_after[anchor]", None),
            fields.pop("expires_after[seconds]", None),
        )
        for name in fields:
            raise InvalidRequest(f"unrecognized form field: {name[:80]}", param=name[:80])
        if anchor is None and seconds is None:
            return self._store.ttl_s
        most = max(LEAST_TTL_S, self._store.ttl_s)
        if anchor != "created_at":
            raise InvalidRequest("expires_after[anchor] must be created_at", param="expires_after[anchor]")
        if seconds is None or not _EXPIRY.fullmatch(seconds) or not LEAST_TTL_S <= int(seconds) <= most:
            raise InvalidRequest(
                f"expires_after[seconds] must be from {LEAST_TTL_S} to {most}", param="expires_after[seconds]"
            )
        return int(seconds)

    async def _form(self, request: web.Request) -> tuple[dict[str, str], bytes]:
        """The fields of an upload, with the file's name as `filename`, and the file.

        Raises:
            InvalidRequest: it is no form, or not such a one.
        """
        if request.content_type != "multipart/form-data":
            raise InvalidRequest("send the file as multipart/form-data")
        fields: dict[str, str] = {}
        data: bytes | None = None
        try:
            form = await request.multipart()
            async for part in form:
                if not isinstance(part, BodyPartReader) or not part.name:
                    raise InvalidRequest("a part of the form has no name")
                if len(fields) >= MAX_FIELDS:
                    raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields")
                if part.name == "file":
                    fields["filename"] = (part.filename or "file")[:256]
                    data = await _bytes_of(part, self._settings.max_file_bytes)
                elif part.name in fields:
                    raise InvalidRequest(f"{part.name[:80]} comes twice", param=part.name[:80])
                else:
                    fields[part.name] = (await _bytes_of(part, FIELD_BYTES)).decode()
        except (web.RequestPayloadError, HttpProcessingError, ValueError, AssertionError, EOFError) as error:
            raise InvalidRequest(f"the form is malformed: {error}"[:200]) from error
        if not data:
            raise InvalidRequest("you must provide a file that is not empty", param="file")
        return fields, data


async def _bytes_of(part: BodyPartReader, limit: int) -> bytes:
    """A part's contents.

    Raises:
        InvalidRequest: they are more than `limit`.
    """
    encoding = part.headers.get("Content-Transfer-Encoding", "binary").lower()
    if encoding not in ("binary", "7bit", "8bit"):
        raise InvalidRequest(f"Content-Transfer-Encoding {encoding[:40]} is not supported", param=part.name)
    if "Content-Encoding" in part.headers:
        raise InvalidRequest("a part's Content-Encoding is not supported", param=part.name)
    pieces: list[bytes] = []
    size = 0
    while True:
        piece = await part.read_chunk(2**16)
        if not piece:
            return b"".join(pieces)
        size += len(piece)
        if size > limit:
            raise InvalidRequest(f"{(part.name or '')[:80]} has more than {limit} bytes", param=part.name)
        pieces.append(bytes(piece))
