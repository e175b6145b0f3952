"""The HTTP server: routes, headers, limits, and what a call asks of the core."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from trireme.errors import RequestCancelled, RequestConflict, RequestNotFound
from trireme.gateway.answer import Answer
from trireme.gateway.arrivals import note_arrival
from trireme.gateway.generation import Generation
from trireme.gateway.identity import PRINCIPAL, Gate, gate_of, http_gate
from trireme.gateway.models import ServedModel
from trireme.gateway.openai_api.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    EmbeddingList,
    ModelCard,
    ModelList,
    TextCompletion,
    TextCompletionChunk,
)
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody, EmbeddingsBody
from trireme.gateway.openai_api.calls import Call, streamed_answer, whole_answer
from trireme.gateway.openai_api.door import Door
from trireme.gateway.openai_api.embeddings import embeddings_answer
from trireme.gateway.openai_api.errors import errors_as_json
from trireme.gateway.openai_api.incoming import REQUEST_ID, caller_of, parsed, read_body
from trireme.gateway.openai_api.openapi import described, description_route
from trireme.gateway.openai_api.prepared import Prepared, prepare_chat, prepare_completion
from trireme.gateway.openai_api.server_log import server_logger
from trireme.gateway.openai_api.shapes import Frame, Shape
from trireme.gateway.quotas import Quotas
from trireme.gateway.settings import Settings
from trireme.gateway.submission import Submission, is_name, new_request_id
from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.health import HealthReporter
from trireme.runtime.metrics_server import metrics_routes
from trireme.runtime.tls import Certificates

HANDSHAKE_S = 10.0


class _IdWasUsed(RequestConflict):
    """A call of this id ended without an answer: this one is a call of its own."""


class OpenAiApi:
    """The handlers."""

    def __init__(self, settings: Settings, core: Generation, links: WorkerLinks) -> None:
        self._settings = settings
        self._core = core
        self._links = links

    def routes(self) -> list[web.RouteDef]:
        """What the server answers to."""
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completions),
            web.post("/v1/embeddings", self.embeddings),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name}", self.model),
        ]

    @described("Answer a conversation.", body=ChatBody, answer=ChatCompletion, event=ChatCompletionChunk)
    async def chat(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._settings)
        body = await parsed(ChatBody, raw)
        caller = caller_of(
            request,
            raw,
            self._settings,
            priority=body.priority,
            service_tier=body.service_tier,
            prompt_cache_key=body.prompt_cache_key,
        )
        prepared = await prepare_chat(self._core, body, caller)
        return await self._answer(request, prepared, body)

    @described("Go on from a prompt.", body=CompletionBody, answer=TextCompletion, event=TextCompletionChunk)
    async def completions(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._settings)
        body = await parsed(CompletionBody, raw)
        caller = caller_of(
            request, raw, self._settings, priority=body.priority, service_tier=body.service_tier
        )
        prepared = await prepare_completion(self._core, body, caller)
        return await self._answer(request, prepared, body)

    @described("Turn texts into vectors.", body=EmbeddingsBody, answer=EmbeddingList)
    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._settings)
        body = await parsed(EmbeddingsBody, raw)
        caller = caller_of(
            request, raw, self._settings, priority=body.priority, service_tier=body.service_tier
        )
        return await embeddings_answer(self._core, body, caller)

    @described("List models and variants.", answer=ModelList, refusals=(401, 403, 429))
    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [self._card(model) for model in self._core.catalog.all()]}
        )

    @described("One model or variant.", answer=ModelCard, refusals=(401, 403, 404, 429))
    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(self._card(self._core.catalog.find(request.match_info["name"])))

    def _card(self, model: ServedModel) -> dict[str, object]:
        served = self._links.served_variants()
        variants = [m.name for m in self._core.catalog.all() if m.variant_of == model.name] or [model.name]
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "trireme",
            "parent": model.variant_of or None,
            "max_model_len": model.context_tokens,
            "ready": model.name in served or any(name in served for name in variants),
        }

    async def _answer(
        self,
        request: web.Request,
        prepared: Prepared,
        body: ChatBody | CompletionBody,
    ) -> web.StreamResponse:
        submissions, shape = prepared.submissions, prepared.shape
        stream, with_usage = bool(body.stream), body.includes_usage
        given = request[REQUEST_ID]
        base_id = submissions[0].caller.request_id
        if len(submissions) > 1:
            base_id = base_id.removesuffix("/0")
        request[REQUEST_ID] = given or base_id
        frame = Frame(
            shape,
            call_id=base_id,
            created=int(time.time()),
            model=prepared.model,
            with_usage=stream and with_usage,
            counts_along=body.counts_along,
        )
        try:
            return await self._once(request, submissions, shape, frame, stream, with_usage)
        except (RequestNotFound, _IdWasUsed):
            if not given:
                raise
        fresh = [replace(s, caller=replace(s.caller, request_id=new_request_id())) for s in submissions]
        return await self._once(request, fresh, shape, frame, stream, with_usage)

    async def _once(
        self,
        request: web.Request,
        submissions: Sequence[Submission],
        shape: Shape,
        frame: Frame,
        stream: bool,
        with_usage: bool,
    ) -> web.StreamResponse:
        with ExitStack() as answers_open:
            answers: list[Answer] = []
            for submission in submissions:
                try:
                    answer = await self._core.submit(submission)
                except (RequestCancelled, RequestConflict) as error:
                    raise _IdWasUsed(error.message) from error
                answers.append(answers_open.enter_context(closing(answer)))
            call = Call(
                shape=shape,
                frame=frame,
                answers=answers,
                choices_each=submissions[0].sampling.n,
                with_usage=with_usage,
                request_id=request[REQUEST_ID],
            )
            if not stream:
                return await whole_answer(call)
            settings = self._settings
            return await streamed_answer(request, call, ping_s=settings.ping_s, stall_s=settings.stall_s)


def openai_app(
    settings: Settings,
    core: Generation,
    links: WorkerLinks,
    health: HealthReporter,
    more_routes: Sequence[web.AbstractRouteDef],
    gate: Gate,
) -> web.Application:
    """All routes, behind the gate."""
    app = web.Application(
        middlewares=[_marked_and_counted(core), errors_as_json, http_gate(gate)],
        client_max_size=settings.max_body_bytes,
    )
    app.add_routes(OpenAiApi(settings, core, links).routes())
    app.add_routes(more_routes)
    app.add_routes(metrics_routes(core.metrics.registry, health))
    app.add_routes([description_route(app)])
    if core.quotas is not None:
        app.on_response_prepare.append(partial(_show_quotas, core.quotas))
    return app


async def _show_quotas(quotas: Quotas, request: web.Request, response: web.StreamResponse) -> None:
    principal = request.get(PRINCIPAL)
    if principal is not None:
        response.headers.update(quotas.headers(principal.tenant))


@asynccontextmanager
async def openai_server(
    settings: Settings,
    core: Generation,
    links: WorkerLinks,
    health: HealthReporter,
    more_routes: Sequence[web.AbstractRouteDef] = (),
    *,
    gate: Gate | None = None,
    certificates: Certificates | None = None,
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the bound host:port."""
    app = openai_app(settings, core, links, health, more_routes, gate or gate_of(settings))
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=server_logger(),
        handler_cancellation=True,
        max_line_size=settings.max_header_bytes,
        max_field_size=settings.max_header_bytes,
        keepalive_timeout=settings.idle_s,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    assert runner.server is not None
    door = Door(
        runner.server,
        max_connections=settings.max_connections,
        on_refused=core.metrics.refused.labels("connections").inc,
    )
    host, _, port = settings.http_listen.rpartition(":")
    try:
        listener = await asyncio.get_running_loop().create_server(
            door,
            host.strip("[]"),
            int(port),
            backlog=1024,
            ssl=certificates.server_context() if certificates is not None else None,
            ssl_handshake_timeout=HANDSHAKE_S if certificates is not None else None,
        )
        try:
            bound = listener.sockets[0].getsockname()
            yield f"{bound[0]}:{bound[1]}"
        finally:
            listener.close()
    finally:
        await runner.cleanup()


def _marked_and_counted(core: Generation) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        note_arrival()
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if is_name(given) else ""  # `_caller` refuses what is not one.
        resource = request.match_info.route.resource  # Not the path: clients may make up any number.
        api = "http" + resource.canonical.replace("/", "_") if resource else "http_unknown"
        code = "cancelled"
        try:
            response = await handler(request)
            code = str(response.status)
            if not response.prepared:
                response.headers.setdefault("x-request-id", request[REQUEST_ID] or new_request_id())
            return response
        finally:
            core.metrics.requests.labels(api, code).inc()

    return middleware
