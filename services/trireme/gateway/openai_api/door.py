"""Who gets in: so many HTTP connections at once, so that a flood of them leaves files for the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from trireme.errors import Overloaded
from trireme.gateway.openai_api.errors import error_response


class Door:
    """Makes the protocol of each new connection: the server's own, or a refusal."""

    def __init__(
        self, server: web.Server, *, max_connections: int, on_refused: Callable[[], None] = lambda: None
    ) -> None:
        """`on_refused` hears of each connection that is not let in."""
        self._server = server
        self._on_refused = on_refused
        self._max_connections = max_connections

    def __call__(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._max_connections:
            self._on_refused()
            return _Refusal(self._max_connections)
        return self._server()


class _Refusal(asyncio.Protocol):
    """Says no, whatever would be asked, and closes."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        error = Overloaded(f"this gateway holds {self._max_connections} connections, its limit")
        response = error_response(error)
        body = response.body
        assert isinstance(body, bytes)
        head = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
        lines = f"HTTP/1.1 {response.status} {response.reason}\r\n{head}"
        lines += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        transport.write(lines.encode() + body)
        transport.close()
