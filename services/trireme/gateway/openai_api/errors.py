"""Errors as OpenAI clients expect them: the error object, the status, when to come back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable

from aiohttp import web

from trireme.errors import Kind, TriremeError
from trireme.runtime.status import HTTP_STATUS

log = logging.getLogger(__name__)

_TYPES: dict[Kind, str] = {
    Kind.INVALID: "invalid_request_error",
    Kind.UNAUTHENTICATED: "authentication_error",
    Kind.FORBIDDEN: "permission_error",
    Kind.NOT_FOUND: "invalid_request_error",
    Kind.CONFLICT: "conflict_error",
    Kind.EXHAUSTED: "rate_limit_error",
    Kind.UNAVAILABLE: "service_unavailable_error",
    Kind.DEADLINE: "timeout_error",
    Kind.CANCELLED: "cancelled_error",
    Kind.ABORTED: "server_error",
}
_RETRY = (Kind.EXHAUSTED, Kind.UNAVAILABLE)
"""Where the same request may succeed later; elsewhere a replay would only double the work."""


def error_object(error: TriremeError) -> dict[str, object]:
    """The body of an error response, and the data of an error event."""
    inner = {
        "message": error.message,
        "type": _TYPES[error.kind],
        "param": error.param,
        "code": error.code,
    }
    return {"error": inner}


def error_response(error: TriremeError) -> web.Response:
    """The response to a request that failed before its first byte."""
    headers = {"x-should-retry": "true" if error.kind in _RETRY else "false"}
    if error.kind in _RETRY:
        after_s = error.retry_after_s or 1.0
        headers["retry-after"] = str(math.ceil(after_s))
        headers["retry-after-ms"] = str(round(after_s * 1000))
    if error.kind is Kind.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return web.json_response(error_object(error), status=HTTP_STATUS[error.kind], headers=headers)


def error_event(error: TriremeError) -> bytes:
    """The last event of a stream that failed after its first byte."""
    return b"data: " + json.dumps(error_object(error)).encode() + b"\n\n"


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give every failure the error object, also those of the HTTP layer."""
    try:
        return await handler(request)
    except TriremeError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = {
            404: f"no such path: {request.method} {request.path}",
            405: f"{request.path} does not take {request.method}",
            413: "the body is larger than this server takes",
        }.get(error.status, error.reason)
        inner = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        headers = {"x-should-retry": "false"}
        if "Allow" in error.headers:
            headers["Allow"] = error.headers["Allow"]
        return web.json_response({"error": inner}, status=error.status, headers=headers)
    except (ConnectionError, TimeoutError):
        raise  # The client's connection; nobody is left to tell.
    except Exception:
        log.exception("handler_failed", extra={"path": request.path})
        inner = {
            "message": "the server failed on this request",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        return web.json_response({"error": inner}, status=500, headers={"x-should-retry": "false"})
