"""What every HTTP call brings: its body, its caller and its id."""

from __future__ import annotations

import asyncio
import hashlib
import re

from aiohttp import web
from aiohttp.http import HttpProcessingError

from trireme.errors import InvalidRequest
from trireme.gateway.identity import current_principal
from trireme.gateway.openai_api.bodies import B, parse
from trireme.gateway.openai_api.sampling import slo_class
from trireme.gateway.settings import Settings
from trireme.gateway.submission import (
    Caller,
    checked_name,
    checked_traceparent,
    is_name,
    new_request_id,
)

PARSE_INLINE_BYTES = 256 * 2**10
"""Larger bodies are parsed in a thread."""
REQUEST_ID = web.RequestKey("request_id", str)
"""The call's id as its client knows it."""
_READABLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,95}")


async def read_body(request: web.Request, settings: Settings) -> bytes:
    """The body, which must come in `body_s` and be what its headers say.

    Raises:
        InvalidRequest: it is not encoded as its headers say.
        HTTPRequestTimeout: it came too slowly.
    """
    try:
        async with asyncio.timeout(settings.body_s):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason="the body came too slowly") from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequest("the body is not encoded as its headers say") from error


async def parsed(body_class: type[B], raw: bytes) -> B:
    """The body as its class; a large one is parsed in a thread.

    Raises:
        InvalidRequest: it is not JSON, or not what the class says.
    """
    if len(raw) > PARSE_INLINE_BYTES:
        return await asyncio.to_thread(parse, body_class, raw)
    return parse(body_class, raw)


def caller_of(
    request: web.Request,
    raw: bytes,
    settings: Settings,
    *,
    priority: int | None = None,
    service_tier: str | None = None,
    prompt_cache_key: str | None = None,
) -> Caller:
    """Who asks, by the call's headers, and how, by them and its body.

    Raises:
        InvalidRequest: a name has other characters than names may have.
    """
    headers = request.headers
    tenant = current_principal().tenant
    checked_name(headers.get("x-request-id", ""), param="x-request-id")
    return Caller(
        request_id=_request_id(request[REQUEST_ID], tenant, request.path, raw),
        tenant=tenant,
        slo_class=slo_class(service_tier, headers.get("x-trireme-slo-class")),
        priority=priority or 0,
        session_id=checked_name(headers.get("x-trireme-session", ""), param="x-trireme-session")
        or _session_of(prompt_cache_key),
        traceparent=checked_traceparent(headers.get("traceparent", "")),
        operation="text_completion" if request.path == "/v1/completions" else "chat",
    )


def _session_of(prompt_cache_key: str | None) -> str:
    """A session's name: bodies may have any text there, names may not."""
    if not prompt_cache_key or is_name(prompt_cache_key):
        return prompt_cache_key or ""
    return "key-" + hashlib.blake2b(prompt_cache_key.encode(), digest_size=16).hexdigest()


def _request_id(given: str, tenant: str, path: str, raw: bytes) -> str:
    """The fleet's id of a call: drawn, or made of the client's id and the call's contents.

    A retry has the same id and contents, and finds the request. Two calls that only share a
    client's id, as traced calls do, are two requests.
    """
    if not given:
        return new_request_id()
    digest = hashlib.blake2b("\0".join((given, tenant, path, "")).encode() + raw, digest_size=8).hexdigest()
    return f"{given}-{digest}" if _READABLE_ID.fullmatch(given) else f"req-{digest}"
