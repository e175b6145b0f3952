"""A batch, driven line by line by whichever gateway holds its lease.

Each line is a request of the batch class in the fleet's durable queue, a window of them at a time.
Its id follows from the batch and the line, so that a gateway that takes over finds the requests
that run. A line's result is written before its request is confirmed: what a dead gateway had not
written is still where it was made.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from trireme.bus.connection import persistently
from trireme.errors import (
    DeadlineExceeded,
    InvalidRequest,
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
from trireme.gateway.batch_store import BatchStore, StoredBatch, Tokens
from trireme.gateway.file_store import FileStore, StoredFile
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.batches_lines import Fault, Input, Line, read_lines
from trireme.gateway.openai_api.batches_responses import BatchedResponse, batched_response
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody, EmbeddingsBody, parse
from trireme.gateway.openai_api.calls import Call, whole_document
from trireme.gateway.openai_api.embeddings import embeddings_document
from trireme.gateway.openai_api.errors import error_object
from trireme.gateway.openai_api.prepared import Prepared, prepare_chat, prepare_completion
from trireme.gateway.openai_api.shapes import Frame
from trireme.gateway.settings import Settings
from trireme.gateway.submission import Caller
from trireme.runtime.shutdown import end_tasks
from trireme.runtime.status import HTTP_STATUS
from trireme.wire.inference.v1.inference_pb2 import SLO_CLASS_BATCH

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a batch is asked whether it is still wanted."""
MAX_TRIES = 3
"""Requests made for one line, where the output of the one before was lost with its gateway."""
LINES_AT_ONCE = 256
"""Results that are moved to a file at a time."""


@dataclass(slots=True)
class _Run:
    """A batch while its lines run here."""

    batch: StoredBatch
    lines: list[Line]
    is_wanted: bool = True
    """False: what still runs is stopped. Else, where this run ends, others go on with it."""
    is_full: bool = False
    """Its results have all the room they may have."""


class BatchDriver:
    """Runs stored batches."""

    def __init__(self, core: Generation, batches: BatchStore, files: FileStore, settings: Settings) -> None:
        self._core = core
        self._batches = batches
        self._files = files
        self._settings = settings

    async def drive(self, batch_id: str) -> None:
        """Run a batch to its end, from wherever it stands.

        Raises:
            One of AWAY: Redis is away; the batch stays as it is.
        """
        try:
            batch = await self._batches.load(batch_id, None)
        except ObjectNotFound:
            return
        if not batch.is_open:
            return
        found = await self._input(batch)
        if batch.state == "validating":
            if found.faults:
                await self._fail(batch, found.faults)
                return
            await self._batches.move(
                batch_id, ["validating"], "in_progress", total=len(found.lines), model=found.model
            )
            batch = await self._batches.load(batch_id, None)
        elif found.faults:  # The file was deleted meanwhile: what is done is given.
            await self._write_files(batch, [], "")
            await self._fail(batch, found.faults)
            return
        ending = {"finalizing": "completed", "cancelling": "cancelled"}.get(batch.state)
        if ending is None:
            ending = await self._run(_Run(batch, found.lines))
        await self._finish(batch, found.lines, ending)

    async def _input(self, batch: StoredBatch) -> Input:
        settings = self._settings
        try:
            file = await self._files.load(batch.about["input_file_id"], batch.tenant)
        except ObjectNotFound:
            return Input([], "", [Fault("file_not_found", "the input file is gone", None, "input_file_id")])
        data = b"".join([piece async for piece in self._files.read(file.file_id)])
        return await asyncio.to_thread(
            read_lines,
            data,
            endpoint=batch.about["endpoint"],
            max_lines=settings.max_batch_lines,
            max_line_bytes=settings.max_body_bytes,
        )

    async def _fail(self, batch: StoredBatch, faults: list[Fault]) -> None:
        errors = json.dumps({"object": "list", "data": [fault.shown() for fault in faults]})
        await self._batches.move(
            batch.batch_id, ["validating", "in_progress", "finalizing", "cancelling"], "failed", errors=errors
        )

    async def _run(self, run: _Run) -> str:
        """Do the lines that have no result; how the batch is to end."""
        have = await self._batches.recorded(run.batch.batch_id)
        to_do = iter([number for number in range(len(run.lines)) if number not in have])
        watching: asyncio.Task[Any] = asyncio.create_task(self._watch(run.batch))
        window = max(1, self._settings.batch_window)
        workers: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._work_off(run, to_do)) for _ in range(window)
        ]
        try:
            working = {*workers}
            while working and not watching.done():
                await asyncio.wait({watching, *working}, return_when=asyncio.FIRST_COMPLETED)
                for task in {task for task in working if task.done()}:
                    task.result()
                    working.discard(task)
            if watching.done():
                ending = str(watching.result())
                run.is_wanted = False
                return ending
            return "completed"
        finally:
            await end_tasks([watching, *workers])

    async def _watch(self, batch: StoredBatch) -> str:
        """Return how the batch is to end, when it is to end early."""
        while True:
            if time.time() > batch.about["expires_at"]:
                return "expired"
            now = await persistently(lambda: self._batches.load_all([batch.batch_id]), what="a batch's state")
            if not now or not now[0].is_open or now[0].state == "cancelling":
                return "cancelled"
            await asyncio.sleep(LOOK_S)

    async def _work_off(self, run: _Run, to_do: Iterator[int]) -> None:
        for number in to_do:
            await self._line(run, number)

    async def _line(self, run: _Run, number: int) -> None:
        """Get one line's result, and write it."""
        batch = run.batch
        caller = Caller(
            request_id=f"{batch.batch_id}.{number}",
            tenant=batch.tenant,
            slo_class=SLO_CLASS_BATCH,
            deadline_unix_s=batch.about["expires_at"],
        )
        tries = 1
        while True:
            try:
                if run.is_full:
                    raise Overloaded(
                        f"the batch's results have {self._settings.max_batch_output_bytes} bytes, their limit"
                    )
                await self._answered(run, number, caller)
                return
            except (RequestNotFound, RequestConflict, RequestCancelled, DeadlineExceeded) as error:
                # Its output went with the gateway before, or it waited for longer than any request may.
                if tries == MAX_TRIES:
                    await self._wrong(run, number, caller, error)
                    return
                tries += 1
                base = f"{batch.batch_id}.{number}"
                caller = replace(caller, request_id=f"{base}.again-{secrets.token_hex(4)}")
            except (Overloaded, ServiceUnavailable) as error:
                if run.is_full:
                    await self._wrong(run, number, caller, error)
                    return
                # A batch has time: the line waits until there is room, or the batch expires.
                await asyncio.sleep(error.retry_after_s or 1.0)
            except TriremeError as error:
                await self._wrong(run, number, caller, error)
                return
            except Exception:
                log.exception("batch_line_failed", extra={"batch_id": batch.batch_id, "line": number})
                failure = RequestFailed("the server failed on this line")
                await self._wrong(run, number, caller, failure)
                return

    async def _answered(self, run: _Run, number: int, caller: Caller) -> None:
        endpoint, raw = run.batch.about["endpoint"], run.lines[number].body
        if endpoint == "/v1/embeddings":
            embeddings = parse(EmbeddingsBody, raw)
            await self._right(run, number, caller, await embeddings_document(self._core, embeddings, caller))
            return
        response: BatchedResponse | None = None
        if endpoint == "/v1/responses":
            response = await batched_response(self._core, raw, caller)
        prepared = response.prepared if response else await self._prepared(endpoint, raw, caller)
        answers: list[Answer] = []
        with ExitStack() as open_answers:
            try:
                for submission in prepared.submissions:
                    answers.append(open_answers.enter_context(closing(await self._core.submit(submission))))
                document = (
                    await response.document(answers[0])
                    if response
                    else await whole_document(_call(prepared, answers, caller))
                )
                # Only when it is written may the answers be closed, and the workers forget them.
                await self._right(run, number, caller, document)
            except (asyncio.CancelledError, ServiceUnavailable, Overloaded):
                for answer in answers:
                    answer.let_go = run.is_wanted
                raise

    async def _prepared(self, endpoint: str, raw: bytes, caller: Caller) -> Prepared:
        body = parse(ChatBody, raw) if endpoint == "/v1/chat/completions" else parse(CompletionBody, raw)
        if body.stream:
            raise InvalidRequest("stream: a batch's answers come whole; leave it out", param="stream")
        caller = replace(caller, priority=body.priority or 0)
        if isinstance(body, ChatBody):
            return await prepare_chat(self._core, body, caller)
        return await prepare_completion(self._core, body, caller)

    async def _right(self, run: _Run, number: int, caller: Caller, document: dict[str, Any]) -> None:
        usage = document["usage"]
        # Responses have names of their own for the same.
        prompt, answer = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
        details = usage.get(f"{prompt}_tokens_details") or {}
        tokens = Tokens(
            prompt=usage[f"{prompt}_tokens"],
            cached=details.get("cached_tokens", 0),
            answer=usage.get(f"{answer}_tokens", 0),
        )
        response = {"status_code": 200, "request_id": caller.request_id, "body": document}
        await self._write(run, number, response, None, good=True, tokens=tokens)

    async def _wrong(self, run: _Run, number: int, caller: Caller, error: TriremeError) -> None:
        status = HTTP_STATUS[error.kind]
        response = {"status_code": status, "request_id": caller.request_id, "body": error_object(error)}
        await self._write(run, number, response, None, good=False)

    async def _write(
        self,
        run: _Run,
        number: int,
        response: dict[str, Any] | None,
        error: dict[str, Any] | None,
        *,
        good: bool,
        tokens: Tokens | None = None,
    ) -> None:
        batch_id = run.batch.batch_id
        text = _result(batch_id, number, run.lines[number], response, error)
        num_bytes = await persistently(
            lambda: self._batches.record(batch_id, number, text, good=good, tokens=tokens or Tokens()),
            what="a batch's line",
        )
        if num_bytes is not None and num_bytes > self._settings.max_batch_output_bytes:
            run.is_full = True

    async def _finish(self, batch: StoredBatch, lines: list[Line], ending: str) -> None:
        """Put the results into files, in the input's order, and end the batch."""
        batch_id = batch.batch_id
        if ending == "completed":
            await self._batches.move(batch_id, ["in_progress"], "finalizing")
        await self._write_files(batch, lines, ending)
        olds = ["in_progress", "finalizing"] if ending != "cancelled" else ["cancelling"]
        if not await self._batches.move(batch_id, olds, ending):
            # It was cancelled when all was done: what was asked for last is said.
            await self._batches.move(batch_id, ["cancelling"], "cancelled")
        await self._batches.drop_results(batch_id)

    async def _write_files(self, batch: StoredBatch, lines: list[Line], ending: str) -> None:
        """Write the output file and the error file, each if there is anything in it."""
        batch_id, total = batch.batch_id, batch.num_lines
        ids = {good: _file_id(batch_id, good=good) for good in (True, False)}
        sizes = {good: await self._files.write(ids[good], b"", anew=True) for good in ids}
        for start in range(0, total, LINES_AT_ONCE):
            numbers = range(start, min(total, start + LINES_AT_ONCE))
            texts: dict[bool, list[str]] = {True: [], False: []}
            for number, result in zip(numbers, await self._batches.results(batch_id, numbers), strict=True):
                if result is not None:
                    texts[result[0]].append(result[1])
                elif number < len(lines):
                    error = {
                        "code": f"batch_{ending}",
                        "message": f"the batch was {ending} before this line had an answer",
                    }
                    texts[False].append(_result(batch_id, number, lines[number], None, error))
            for good, some in texts.items():
                if some:
                    sizes[good] += await self._files.write(ids[good], ("\n".join(some) + "\n").encode())
        now = int(time.time())
        for good, name in ((True, "output"), (False, "error")):
            if sizes[good]:
                file = StoredFile(
                    file_id=ids[good],
                    tenant=batch.tenant,
                    filename=f"{batch_id}_{name}.jsonl",
                    purpose="batch_output",
                    num_bytes=sizes[good],
                    created_at=now,
                    expires_at=now + batch.about["output_ttl_s"],
                )
                await self._files.publish(file, bounded=False)
        await self._batches.note(
            batch_id,
            output_file_id=ids[True] if sizes[True] else "",
            error_file_id=ids[False] if sizes[False] else "",
        )


def _call(prepared: Prepared, answers: list[Answer], caller: Caller) -> Call:
    """A line of chats or completions as a call that wants the whole answer."""
    return Call(
        shape=prepared.shape,
        frame=Frame(
            prepared.shape,
            call_id=caller.request_id,
            created=int(time.time()),
            model=prepared.model,
            with_usage=False,
        ),
        answers=answers,
        choices_each=prepared.submissions[0].sampling.n,
        with_usage=False,
        request_id=caller.request_id,
    )


def _result(
    batch_id: str, number: int, line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> str:
    """A line of the output."""
    digest = hashlib.blake2b(f"{batch_id}.{number}".encode(), digest_size=16).hexdigest()
    return json.dumps(
        {"id": f"batch_req_{digest}", "custom_id": line.custom_id, "response": response, "error": error}
    )


def _file_id(batch_id: str, *, good: bool) -> str:
    """The same for every gateway that comes to write it."""
    name = f"{batch_id}.{'output' if good else 'error'}"
    return f"file-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
