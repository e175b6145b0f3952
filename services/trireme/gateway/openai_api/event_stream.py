"""Server-sent events to one client, with comments while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from trireme.errors import TriremeError
from trireme.gateway.openai_api.errors import error_event


class EventStream:
    """The response to one call, which is prepared with its first event."""

    def __init__(self, request: web.Request, *, request_id: str, stall_s: float) -> None:
        self._request = request
        self._stall_s = stall_s
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "x-request-id": request_id,
            }
        )

    @property
    def has_begun(self) -> bool:
        """The status went out: what goes wrong now can only be said in an event."""
        return self.response.prepared

    async def send(self, data: bytes, *, last: bool = False) -> None:
        """Send some events.

        Raises:
            ConnectionError, TimeoutError: the client is gone, or took nothing for `stall_s`.
        """
        if not self.response.prepared:
            await self.response.prepare(self._request)
        async with asyncio.timeout(self._stall_s):
            if data:
                await self.response.write(data)
            if last:
                await self.response.write_eof()

    async def ping(self) -> None:
        """A comment, which clients ignore."""
        await self.send(b": ping\n\n")

    def abandon(self) -> None:
        """The client is gone: drop what it did not take."""
        if self._request.transport is not None:
            self._request.transport.abort()


@asynccontextmanager
async def failing_in_events(stream: EventStream) -> AsyncIterator[None]:
    """An error in the block is the last event of a stream that has begun; who is gone is let go.

    Before the first event all is raised: the status can still say it.
    """
    try:
        yield
    except TriremeError as error:
        if not stream.has_begun:
            raise
        with suppress(ConnectionError, TimeoutError):
            await stream.send(error_event(error), last=True)
    except (ConnectionError, TimeoutError):
        if not stream.has_begun:
            raise
        stream.abandon()
