"""The HTTP API's own description, OpenAPI 3.1: made of the routes, the bodies and the answers.

A handler says beside itself what it takes and gives, by `@described`; whatever is routed and does
not is named by `undescribed`, which a test wants to be empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trireme.gateway.openai_api.answers import Failure

H = TypeVar("H", bound=Callable[..., Any])
JSON = "application/json"
_MARK = "__openapi__"
_COMPONENT = "#/components/schemas/{model}"
_REFUSALS = {
    400: "A field is not right; `param` names it.",
    401: "The key is missing or unknown, where keys are asked for.",
    403: "The key does not allow this.",
    404: "There is no such model or object.",
    408: "The body came too slowly.",
    409: "Another call with the same id contradicts this one.",
    413: "The body is too large.",
    429: "Too much is asked for at the moment; `retry-after` says when to come back.",
    499: "Another call cancelled the request.",
    500: "The fleet failed on this request; `message` says how.",
    503: "The fleet cannot answer now; `retry-after` says when to come back.",
    504: "The deadline passed.",
}
_HEADERS: dict[str, tuple[str, str]] = {
    "x-request-id": (
        "The call's id; a retry with the same id and body finds the same request.",
        "^[!-~]{1,128}$",
    ),
    "x-trireme-session": ("Calls of one session find each other's KV again.", "^[!-~]{1,128}$"),
    "x-trireme-slo-class": ("How soon the answer is needed.", "^(interactive|standard|batch)$"),
    "traceparent": ("W3C trace context.", "^[!-~]*$"),
}
PAGING_QUERY = {
    "after": "The page after the object of this id.",
    "limit": "Objects of a page.",
    "order": "asc or desc, by age.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One operation."""

    summary: str
    body: type[BaseModel] | None = None
    """JSON that it takes."""
    form: Mapping[str, str] | None = None
    """Fields of a multipart form that it takes, with a sentence each; the field `file` is a file."""
    answer: type[BaseModel] | None = None
    """JSON that it gives."""
    event: type[BaseModel] | None = None
    """What each event of its stream has, if it can stream."""
    text: str = ""
    """The type of what it gives, if that is not JSON."""
    refusals: tuple[int, ...] = tuple(_REFUSALS)
    plain_refusals: Mapping[int, str] = field(default_factory=dict)
    """Statuses that come with a text, not with the error object."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the query, with a sentence each."""


def described(summary: str, **rest: Any) -> Callable[[H], H]:
    """Say what a handler takes and gives; the arguments are those of `Description`."""
    description = Description(summary=summary, **rest)

    def mark(handler: H) -> H:
        setattr(handler, _MARK, description)
        return handler

    return mark


_OF_THE_PROCESS = {
    "/metrics": Description(
        summary="What the gateway measures, for Prometheus.", text="text/plain", refusals=()
    ),
    "/livez": Description(summary="The process answers.", text="text/plain", refusals=()),
    "/readyz": Description(
        summary="The fleet can answer.",
        text="text/plain",
        refusals=(),
        plain_refusals={503: "It cannot; the text says why."},
    ),
    "/health": Description(
        summary="As `/readyz`, for clients that know servers by this name.",
        text="text/plain",
        refusals=(),
        plain_refusals={503: "It cannot; the text says why."},
    ),
}
"""Routes that all services have; they know nothing of this module."""


def description_route(app: web.Application) -> web.RouteDef:
    """`/openapi.json`, of all routes that the application has when it is first asked."""
    document: list[bytes] = []

    @described("This description.", text=JSON, refusals=(401, 403))
    async def show(_: web.Request) -> web.Response:
        if not document:
            document.append(json.dumps(description_of(app.router.routes())).encode())
        return web.Response(body=document[0], content_type=JSON)

    return web.get("/openapi.json", show)


def undescribed(routes: Iterable[web.AbstractRoute]) -> list[str]:
    """The operations that say nothing of themselves."""
    return [f"{route.method} {_path(route)}" for route in _operations(routes) if _found(route) is None]


def description_of(routes: Iterable[web.AbstractRoute]) -> dict[str, Any]:
    """The document, of all described routes."""
    paths: dict[str, Any] = {}
    models: dict[type[BaseModel], None] = {Failure: None}
    for route in _operations(routes):
        found = _found(route)
        if found is None:
            continue
        for model in (found.body, found.answer, found.event):
            if model is not None:
                models[model] = None
        paths.setdefault(_path(route), {})[route.method.lower()] = _operation(route, found)
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_COMPONENT)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trireme",
            "version": version("trireme"),
            "description": "OpenAI's API over a fleet of workers. A field is honoured or refused by name.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operations(routes: Iterable[web.AbstractRoute]) -> list[web.AbstractRoute]:
    return [route for route in routes if route.method != "HEAD" and route.resource is not None]


def _path(route: web.AbstractRoute) -> str:
    assert route.resource is not None
    return route.resource.canonical


def _found(route: web.AbstractRoute) -> Description | None:
    found = getattr(route.handler, _MARK, None)
    return found if isinstance(found, Description) else _OF_THE_PROCESS.get(_path(route))


def _operation(route: web.AbstractRoute, found: Description) -> dict[str, Any]:
    path = _path(route)
    words = re.findall(r"[a-z0-9]+", path.removeprefix("/v1"))
    operation: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *words]),
        "summary": found.summary,
        "responses": {"200": _success(found)},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
        for name, text in found.query.items()
    ]
    if found.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(found.body)}}}
        parameters += [
            {"name": name, "in": "header", "description": text, "schema": {"type": "string", "pattern": form}}
            for name, (text, form) in _HEADERS.items()
        ]
    if found.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": _form(found.form)}}
    if parameters:
        operation["parameters"] = parameters
    for status in found.refusals:
        operation["responses"][str(status)] = {
            "description": _REFUSALS[status],
            "content": {JSON: {"schema": _ref(Failure)}},
        }
    for status, text in found.plain_refusals.items():
        operation["responses"][str(status)] = {
            "description": text,
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    return operation


def _success(found: Description) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if found.answer is not None:
        content[JSON] = {"schema": _ref(found.answer)}
    if found.event is not None:
        # A stream of events is a text to OpenAPI 3.1, which has no word for what each holds.
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-event": _ref(found.event)}
    if found.text:
        content[found.text] = {"schema": {"type": "object" if found.text == JSON else "string"}}
    return {"description": "The answer.", "content": content}


def _form(fields: Mapping[str, str]) -> dict[str, Any]:
    properties: dict[str, Any] = {
        name: {"type": "string", "description": text} for name, text in fields.items()
    }
    properties["file"]["contentMediaType"] = "application/octet-stream"
    return {"schema": {"type": "object", "properties": properties, "required": ["file"]}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _COMPONENT.format(model=model.__name__)}
