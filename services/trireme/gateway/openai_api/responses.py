"""/v1/responses: answers that can be kept, asked for again, and run without their client."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace

from aiohttp import web

from trireme.bus.connection import AWAY
from trireme.errors import (
    InvalidRequest,
    ObjectNotFound,
    PreviousResponseNotFound,
    RequestCancelled,
    RequestConflict,
    RequestNotFound,
    ServiceUnavailable,
    StorageFull,
    TriremeError,
)
from trireme.gateway.answer import Answer
from trireme.gateway.background_work import BackgroundWork
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.answers import DeletedObject, ObjectPage, ResponseEvent, ResponseObject
from trireme.gateway.openai_api.event_stream import EventStream, failing_in_events
from trireme.gateway.openai_api.incoming import REQUEST_ID, caller_of, parsed, read_body
from trireme.gateway.openai_api.listing import flag, kept, page_of, query_of, whole_number
from trireme.gateway.openai_api.openapi import PAGING_QUERY, described
from trireme.gateway.openai_api.prepared import Prepared, prepare_chat
from trireme.gateway.openai_api.responses_asking import (
    LOGPROBS,
    Asked,
    Json,
    ResponseBody,
    as_a_response_calls_it,
    ask,
    response_id_of,
)
from trireme.gateway.openai_api.responses_output import Output, failed
from trireme.gateway.openai_api.responses_shapes import (
    End,
    Entry,
    EventLog,
    response_object,
    sse,
)
from trireme.gateway.response_store import ResponseStore, StoredResponse
from trireme.gateway.settings import Settings
from trireme.gateway.submission import Caller, new_request_id

log = logging.getLogger(__name__)

FOLLOW_S = 0.1
"""How often a stream of a stored response looks for more."""
_RETRIEVAL = ("include", "include[]", "include_obfuscation", "starting_after", "stream")


class ResponsesApi:
    """The handlers."""

    def __init__(
        self, settings: Settings, core: Generation, store: ResponseStore, background: BackgroundWork
    ) -> None:
        self._settings = settings
        self._core = core
        self._store = store
        self._background = background

    def routes(self) -> list[web.RouteDef]:
        """What the server answers to."""
        return [
            web.post("/v1/responses", self.create),
            web.get("/v1/responses/{response_id}", self.retrieve),
            web.delete("/v1/responses/{response_id}", self.delete),
            web.post("/v1/responses/{response_id}/cancel", self.cancel),
            web.get("/v1/responses/{response_id}/input_items", self.input_items),
        ]

    @described("Answer, and keep the answer.", body=ResponseBody, answer=ResponseObject, event=ResponseEvent)
    async def create(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._settings)
        body = await parsed(ResponseBody, raw)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        caller = caller_of(
            request,
            raw,
            self._settings,
            priority=body.priority,
            service_tier=body.service_tier,
            prompt_cache_key=body.prompt_cache_key,
        )
        given = request[REQUEST_ID]
        request[REQUEST_ID] = given or caller.request_id
        before, session_id = await self._before(body, caller)
        asked, prepared = await self._asked(body, caller, before, session_id)
        if body.background:
            return await self._in_background(request, asked, caller.tenant, stream=bool(body.stream))
        try:
            answer = await self._core.submit(prepared.submissions[0])
        except (RequestNotFound, RequestCancelled, RequestConflict):
            if not given:
                raise
            # A call of this id ended without an answer: this one is a call of its own.
            caller = replace(caller, request_id=new_request_id())
            asked, prepared = await self._asked(body, caller, before, session_id)
            answer = await self._core.submit(prepared.submissions[0])
        with closing(answer):
            if body.stream:
                return await self._streamed(request, asked, prepared, answer)
            return await self._whole(request, asked, prepared, answer)

    @described(
        "A kept response, as it stands or as a stream.",
        answer=ResponseObject,
        event=ResponseEvent,
        query={
            "stream": "true: its events, from the first one on.",
            "starting_after": "With stream: the events after this sequence number.",
            "include": "What else to show: message.output_text.logprobs.",
            "include_obfuscation": "Accepted; none is sent.",
        },
    )
    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        query = query_of(request, _RETRIEVAL)
        for name in (*query.getall("include", []), *query.getall("include[]", [])):
            if name != LOGPROBS:
                raise InvalidRequest(f"include: {name[:80]!r} is not known", param="include")
        stream = flag(query, "stream")
        after = whole_number(query, "starting_after", least=0)
        if after is not None and not stream:
            raise InvalidRequest("starting_after needs stream to be true", param="starting_after")
        response_id, tenant = self._named(request)
        if stream:
            return await self._followed(request, response_id, tenant, after=-1 if after is None else after)
        return web.json_response(await self._now(response_id, tenant))

    @described("Forget a response; it is stopped where it still runs.", answer=DeletedObject)
    async def delete(self, request: web.Request) -> web.Response:
        response_id, tenant = self._named(request)
        stored = await self._load(response_id, tenant)
        if stored.is_open:
            await self._stop(stored)
        await kept(self._store.delete(response_id, tenant))
        return web.json_response({"id": response_id, "object": "response", "deleted": True})

    @described("Stop a response that runs in the background.", answer=ResponseObject)
    async def cancel(self, request: web.Request) -> web.Response:
        response_id, tenant = self._named(request)
        stored = await self._load(response_id, tenant)
        if not stored.asked["shown"]["background"]:
            raise InvalidRequest("only a background response can be cancelled", param="response_id")
        if stored.is_open:
            await self._stop(stored)
        return web.json_response(await self._now(response_id, tenant))

    @described("What a response was asked.", answer=ObjectPage, query=PAGING_QUERY)
    async def input_items(self, request: web.Request) -> web.Response:
        query = query_of(request, ("after", "include", "include[]", "limit", "order"))
        response_id, tenant = self._named(request)
        stored = await self._load(response_id, tenant)
        return web.json_response(page_of(Asked.from_json(stored.asked).input_items, query))

    async def _asked(
        self, body: ResponseBody, caller: Caller, before: list[Json], session_id: str
    ) -> tuple[Asked, Prepared]:
        """What is asked, checked."""
        response_id = response_id_of(caller.tenant, caller.request_id)
        asked = ask(
            body,
            caller,
            response_id=response_id,
            created_at=int(time.time()),
            seed=secrets.randbits(63),
            before=before,
            session_id=session_id or response_id,
        )
        try:
            return asked, await prepare_chat(self._core, asked.chat_body(), asked.caller_again())
        except TriremeError as error:
            raise as_a_response_calls_it(error) from error

    async def _before(self, body: ResponseBody, caller: Caller) -> tuple[list[Json], str]:
        """The conversation that a response goes on with, and its session."""
        previous_id = body.previous_response_id
        if previous_id is None:
            return [], ""
        try:
            stored, entries = await kept(self._store.follow(previous_id, caller.tenant, 0))
        except ObjectNotFound:
            raise PreviousResponseNotFound(
                f"no response {previous_id[:80]!r} here to go on from", param="previous_response_id"
            ) from None
        if stored.state not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"the previous response is {stored.state}: only one that has an answer can be gone on from",
                param="previous_response_id",
            )
        asked, end = Asked.from_json(stored.asked), _end_of(stored)
        text = "".join(Entry.decoded(entry).text for entry in entries) if end.text is None else end.text
        answer: Json = {"role": "assistant", "content": text or ("" if not end.tool_calls else None)}
        if end.tool_calls:
            answer["tool_calls"] = list(end.tool_calls)
        return [*asked.messages, answer], asked.caller["session_id"]

    async def _in_background(
        self, request: web.Request, asked: Asked, tenant: str, *, stream: bool
    ) -> web.StreamResponse:
        response_id = asked.shown["id"]
        is_new = await kept(self._store.open(response_id, tenant, asked.as_json()))
        if is_new:
            await kept(self._background.start(response_id))
        if stream:
            return await self._followed(request, response_id, tenant, after=-1)
        return web.json_response(asked.shown if is_new else await self._now(response_id, tenant))

    async def _whole(
        self, request: web.Request, asked: Asked, prepared: Prepared, answer: Answer
    ) -> web.Response:
        answer.hear_only_the_end()
        output = Output(answer, prepared.submissions[0].model.vocabulary, prepared.reader)
        while not answer.delivered:
            output.hear(await answer.news())
        entries, end = output.take(), output.end()
        events = EventLog(await self._keep(asked, entries, end))
        events.add(entries)
        document = response_object(events.shown, events.texts, events.logprobs, end)
        return web.json_response(document, headers={"x-request-id": request[REQUEST_ID]})

    async def _streamed(
        self, request: web.Request, asked: Asked, prepared: Prepared, answer: Answer
    ) -> web.StreamResponse:
        stream = EventStream(request, request_id=request[REQUEST_ID], stall_s=self._settings.stall_s)
        events = EventLog(asked.shown)
        output = Output(answer, prepared.submissions[0].model.vocabulary, prepared.reader)
        entries: list[Entry] = []
        fresh = events.opening()
        async with failing_in_events(stream):
            while not answer.delivered:
                try:
                    heard = await answer.news(timeout_s=self._settings.ping_s)
                except ServiceUnavailable:
                    raise  # It is this gateway that goes, not the response that fails.
                except TriremeError as error:
                    if not stream.has_begun:
                        raise
                    await stream.send(_on_the_wire(events.finish(failed(error))), last=True)
                    return stream.response
                if not heard:
                    await stream.ping()
                output.hear(heard)
                new = output.take()
                entries += new
                fresh += events.add(new)
                await stream.send(_on_the_wire(fresh))
                fresh = []
            end = output.end()
            events.shown = await self._keep(asked, entries, end)
            await stream.send(_on_the_wire(events.finish(end)), last=True)
        return stream.response

    async def _followed(
        self, request: web.Request, response_id: str, tenant: str, *, after: int
    ) -> web.StreamResponse:
        """The events of a stored response behind number `after`: those that were, and those to come."""
        stream = EventStream(
            request, request_id=request[REQUEST_ID] or new_request_id(), stall_s=self._settings.stall_s
        )
        events: EventLog | None = None
        place = 0
        silent_since_s = time.monotonic()
        async with failing_in_events(stream):
            while True:
                fresh: list[Json] = []
                try:
                    stored, entries = await self._store.follow(response_id, tenant, place)
                except AWAY as error:
                    if not stream.has_begun:
                        raise ServiceUnavailable(
                            "the store of responses does not answer: try again"
                        ) from error
                    stored, entries = None, []
                if stored is not None:
                    if events is None:
                        events = EventLog(stored.asked["shown"])
                        fresh += events.opening()
                    place += len(entries)
                    if stored.state != "queued":
                        fresh += events.begin()
                    fresh += events.add(Entry.decoded(entry) for entry in entries)
                    if not stored.is_open:
                        fresh += events.finish(_end_of(stored))
                fresh = [event for event in fresh if event["sequence_number"] > after]
                is_last = stored is not None and not stored.is_open
                if fresh or is_last:
                    await stream.send(_on_the_wire(fresh), last=is_last)
                    silent_since_s = time.monotonic()
                if is_last:
                    return stream.response
                if time.monotonic() - silent_since_s >= self._settings.ping_s:
                    await stream.ping()
                    silent_since_s = time.monotonic()
                await asyncio.sleep(FOLLOW_S)
        return stream.response

    async def _keep(self, asked: Asked, entries: list[Entry], end: End) -> Json:
        """Store a response that has ended, if it is to be; the object as it begins, which says so."""
        shown = asked.shown
        if not shown["store"]:
            return shown
        try:
            await self._store.keep(
                shown["id"],
                asked.caller["tenant"],
                asked.as_json(),
                state=end.status,
                final=end.as_json(),
                output=[entry.encoded() for entry in entries],
            )
        except (StorageFull, *AWAY) as error:
            # The answer is there: it is given, and says that nothing was kept of it.
            log.warning("response_not_stored", extra={"response_id": shown["id"], "error": str(error)})
            return {**shown, "store": False}
        return shown

    async def _stop(self, stored: StoredResponse) -> None:
        await kept(self._store.end(stored.response_id, state="cancelled", final=End(status="").as_json()))
        with suppress(ServiceUnavailable):  # Its driver sees the same a moment later.
            await self._core.cancel(stored.asked["caller"]["request_id"], tenant=stored.tenant)

    async def _load(self, response_id: str, tenant: str) -> StoredResponse:
        return await kept(self._store.load(response_id, tenant))

    async def _now(self, response_id: str, tenant: str) -> Mapping[str, object]:
        """The response object as it stands."""
        stored, entries = await kept(self._store.follow(response_id, tenant, 0))
        shown = stored.asked["shown"]
        if stored.is_open:
            return response_object(shown, (), (), None, status=stored.state)
        found = [Entry.decoded(entry) for entry in entries]
        logprobs = [row for entry in found for row in entry.logprobs]
        return response_object(shown, [entry.text for entry in found], logprobs, _end_of(stored))

    def _named(self, request: web.Request) -> tuple[str, str]:
        """The response that a path names, and whose it must be."""
        return request.match_info["response_id"], caller_of(request, b"", self._settings).tenant


def _end_of(stored: StoredResponse) -> End:
    return End(status=stored.state, **(stored.final or {}))


def _on_the_wire(events: list[Json]) -> bytes:
    return b"".join(map(sse, events))
