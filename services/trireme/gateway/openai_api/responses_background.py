"""A background response: run to its end by whichever gateway holds its lease."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace

from trireme.bus.connection import AWAY
from trireme.errors import (
    DeadlineExceeded,
    ObjectNotFound,
    Overloaded,
    RequestCancelled,
    RequestConflict,
    RequestFailed,
    RequestNotFound,
    ServiceUnavailable,
    TriremeError,
)
from trireme.gateway.answer import Answer
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.prepared import prepare_chat
from trireme.gateway.openai_api.responses_asking import Asked
from trireme.gateway.openai_api.responses_output import Output, failed
from trireme.gateway.openai_api.responses_shapes import End
from trireme.gateway.openai_api.tool_shape import ReaderOf
from trireme.gateway.response_store import ResponseStore, StoredResponse
from trireme.gateway.submission import Submission

log = logging.getLogger(__name__)

WRITE_S = 0.1
"""Least time between two writes of one response's output: tokens that come meanwhile go together."""
LOOK_S = 1.0
"""A response that has nothing to say for so long is asked whether it is still wanted."""
MAX_TRIES = 3
"""Requests made for one response, where the output of the one before was lost with its gateway."""


class ResponseDriver:
    """Runs stored responses."""

    def __init__(self, core: Generation, store: ResponseStore, *, max_request_s: float) -> None:
        self._core = core
        self._store = store
        self._max_request_s = max_request_s

    async def drive(self, response_id: str) -> None:
        """Run it to its end, from wherever it stands.

        Raises:
            One of AWAY: Redis is away; the response stays as it is.
        """
        try:
            stored = await self._store.load(response_id, None)
        except ObjectNotFound:
            return
        if not stored.is_open:
            return
        try:
            await self._run(stored)
        except AWAY:
            raise
        except TriremeError as error:
            await self._end(stored, failed(error))
        except Exception:
            log.exception("response_failed", extra={"response_id": response_id})
            await self._end(stored, failed(RequestFailed("the server failed on this response")))

    async def _run(self, stored: StoredResponse) -> None:
        asked = Asked.from_json(stored.asked)
        prepared = await prepare_chat(self._core, asked.chat_body(), asked.caller_again())
        submission = prepared.submissions[0]
        latest_unix_s = asked.shown["created_at"] + self._max_request_s
        tries = 1
        while True:
            try:
                answer = await self._core.submit(submission)
            except (RequestNotFound, RequestConflict, RequestCancelled):
                # Its output went with the gateway before, or its prompt is another one today.
                await self._check_wanted(stored)
                if tries == MAX_TRIES:
                    raise
                tries += 1
                submission = _under_another_id(submission)
                continue
            except (Overloaded, ServiceUnavailable) as error:
                await self._check_wanted(stored)
                if time.time() > latest_unix_s:
                    raise DeadlineExceeded("the fleet had no room for this response in time") from error
                await asyncio.sleep(error.retry_after_s or LOOK_S)
                continue
            try:
                if await self._deliver(stored, submission, answer, prepared.reader):
                    return
            except (RequestNotFound, RequestCancelled):
                await self._check_wanted(stored)
                if tries == MAX_TRIES:
                    raise
                tries += 1
                submission = _under_another_id(submission)

    async def _deliver(
        self, stored: StoredResponse, submission: Submission, answer: Answer, reader: ReaderOf | None
    ) -> bool:
        """Write an answer down; False where it must be asked for again."""
        output = Output(answer, submission.model.vocabulary, reader)
        place = 0
        try:
            while not answer.delivered:
                output.hear(await answer.news(timeout_s=LOOK_S))
                entries = [entry.encoded() for entry in output.take()]
                wanted = await self._store.append(stored.response_id, stored.tenant, place, entries)
                if not wanted:
                    return True
                place += len(entries)
                if not answer.delivered:
                    await asyncio.sleep(WRITE_S)
            await self._end(stored, output.end())
        except ServiceUnavailable:
            answer.let_go = True
            return False
        except (asyncio.CancelledError, *AWAY):
            answer.let_go = True
            raise
        finally:
            # Only now: the worker keeps the output until it is confirmed here.
            answer.close()
        return True

    async def _check_wanted(self, stored: StoredResponse) -> None:
        now = await self._store.load(stored.response_id, None)
        if not now.is_open:
            raise RequestCancelled("the response was cancelled")

    async def _end(self, stored: StoredResponse, end: End) -> None:
        await self._store.end(stored.response_id, state=end.status, final=end.as_json())


def _under_another_id(submission: Submission) -> Submission:
    caller = submission.caller
    base = caller.request_id.split(".again-")[0]
    return replace(submission, caller=replace(caller, request_id=f"{base}.again-{secrets.token_hex(4)}"))
