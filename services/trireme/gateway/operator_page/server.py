"""The page's own HTTP server: three files and four answers in JSON, all read-only."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from trireme.errors import InvalidApiKey, PermissionDenied
from trireme.gateway.identity import Gate, is_loopback
from trireme.gateway.operator_page.fleet_picture import totals
from trireme.gateway.operator_page.history import PERIOD_S, History
from trireme.gateway.timelines import Timeline, Timelines
from trireme.runtime.shutdown import end_tasks
from trireme.runtime.tenant_keys import Role
from trireme.runtime.tls import Certificates

FRESH_S = 1.0
"""A picture so young is shown again: many viewers cost the fleet no more than one."""
MOST_REQUESTS = 200
_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Look = Callable[[], Awaitable[dict[str, Any]]]


class OperatorPage:
    """The handlers.

    Args:
        look: a picture of the fleet.
        timelines: of the requests that this gateway answered.
        gateway_id: shown, since the requests are those of this gateway alone.
    """

    def __init__(self, look: Look, timelines: Timelines, *, gateway_id: str) -> None:
        self._look = look
        self._timelines = timelines
        self._gateway_id = gateway_id
        self._history = History()
        self._picture: dict[str, Any] = {}
        self._seen_s = -FRESH_S
        self._looking = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """What the server answers to."""
        return [
            *(web.get("/" if name == "index.html" else f"/{name}", _shown(name)) for name in _TYPES),
            web.get("/api/now", self.now),
            web.get("/api/history", self.history),
            web.get("/api/requests", self.requests),
            web.get("/api/requests/{request_id:.+}", self.request),
        ]

    async def watch(self) -> None:
        """Take the hour's samples, for ever."""
        while True:
            self._history.add(time.time(), totals(await self._fresh()))
            await asyncio.sleep(PERIOD_S)

    async def now(self, _: web.Request) -> web.Response:
        picture = await self._fresh()
        return web.json_response({"gateway": self._gateway_id, "at_unix_s": time.time(), **picture})

    async def history(self, request: web.Request) -> web.Response:
        try:
            since_unix_s = float(request.query.get("since_unix_s", "0"))
        except ValueError:
            raise web.HTTPBadRequest(text="since_unix_s must be seconds since 1970") from None
        return web.json_response({"period_s": PERIOD_S, "samples": self._history.since(since_unix_s)})

    async def requests(self, _: web.Request) -> web.Response:
        return web.json_response([_line(each) for each in self._timelines.latest(MOST_REQUESTS)])

    async def request(self, request: web.Request) -> web.Response:
        timeline = self._timelines.find(request.match_info["request_id"])
        if timeline is None:
            raise web.HTTPNotFound(
                text="this gateway does not remember that request: it keeps the newest ones"
            )
        return web.json_response(asdict(timeline))

    async def _fresh(self) -> dict[str, Any]:
        async with self._looking:
            if time.monotonic() - self._seen_s >= FRESH_S:
                self._picture = await self._look()
                self._seen_s = time.monotonic()
            return self._picture


@asynccontextmanager
async def operator_server(
    listen: str, page: OperatorPage, gate: Gate, certificates: Certificates | None = None
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the bound host:port.

    Who may see it is `gate_of`'s to check.
    """
    app = web.Application(middlewares=[_guarded(gate, is_local=is_loopback(listen))], client_max_size=1024)
    app.add_routes(page.routes())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=30.0)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    tls = certificates.server_context() if certificates is not None else None
    await web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=tls).start()
    watching = asyncio.create_task(page.watch())
    bound = runner.addresses[0]
    try:
        yield f"{bound[0]}:{bound[1]}"
    finally:
        await end_tasks([watching])
        await runner.cleanup()


def _shown(name: str) -> Handler:
    content = files(__package__).joinpath(name).read_bytes()

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=content, content_type=_TYPES[name], charset="utf-8")

    return show


def _guarded(gate: Gate, *, is_local: bool) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if gate.book is not None:
            try:
                gate.admit({"authorization": f"Bearer {_key_of(request)}"}, Role.ADMIN)
            except InvalidApiKey as error:
                asks = {"WWW-Authenticate": 'Basic realm="Trireme: an API key of role admin as the password"'}
                return web.Response(status=401, text=error.message, headers={**_HEADERS, **asks})
            except PermissionDenied as error:
                return web.Response(status=403, text=error.message, headers=_HEADERS)
        elif is_local and not _is_local_name(request.host):
            # Another site's name that points here would let that site's scripts read the page.
            return web.Response(
                status=403, text="ask for this page by 127.0.0.1 or localhost", headers=_HEADERS
            )
        try:
            response = await handler(request)
        except web.HTTPException as refusal:
            response = web.Response(status=refusal.status, text=refusal.text)
        response.headers.update(_HEADERS)
        return response

    return middleware


def _key_of(request: web.Request) -> str:
    """The key in an Authorization header, where browsers send it as a password."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return value.strip() if scheme.lower() == "bearer" else ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _is_local_name(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _line(timeline: Timeline) -> dict[str, Any]:
    """A request in the list."""
    return {
        "request_id": timeline.request_id,
        "operation": timeline.operation,
        "tenant": timeline.tenant,
        "model": timeline.model,
        "variant": timeline.variant,
        "outcome": timeline.outcome,
        "start_unix_s": timeline.start_unix_s,
        "seconds": timeline.seconds,
        "ttft_s": next(
            (p.end_unix_s - timeline.start_unix_s for p in timeline.phases if p.name == "prefill"), None
        ),
        "prompt_tokens": timeline.prompt_tokens,
        "cached_prompt_tokens": timeline.cached_prompt_tokens,
        "completion_tokens": timeline.completion_tokens,
    }
