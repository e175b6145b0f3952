"""/v1/responses as a batch's line: a response that is kept nowhere but in the batch's output."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

from trireme.errors import InvalidRequest, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.bodies import parse
from trireme.gateway.openai_api.prepared import Prepared, prepare_chat
from trireme.gateway.openai_api.responses_asking import (
    Asked,
    ResponseBody,
    as_a_response_calls_it,
    ask,
    response_id_of,
)
from trireme.gateway.openai_api.responses_output import Output
from trireme.gateway.openai_api.responses_shapes import EventLog, response_object
from trireme.gateway.submission import Caller

_REFUSED = {
    "stream": "a batch's answers come whole",
    "background": "a batch is in the background already",
    "store": "a batch's responses are in its output file",
    "previous_response_id": "the lines of a batch stand alone",
}


@dataclass(frozen=True, slots=True)
class BatchedResponse:
    """A line, understood."""

    asked: Asked
    prepared: Prepared

    async def document(self, answer: Answer) -> dict[str, Any]:
        """The response object, once the answer has come to its end.

        Raises:
            TriremeError: it cannot be given.
        """
        answer.hear_only_the_end()
        output = Output(answer, self.prepared.submissions[0].model.vocabulary, self.prepared.reader)
        while not answer.delivered:
            output.hear(await answer.news())
        events = EventLog(self.asked.shown)
        events.add(output.take())
        return dict(response_object(events.shown, events.texts, events.logprobs, output.end()))


async def batched_response(core: Generation, raw: bytes, caller: Caller) -> BatchedResponse:
    """Check a line's body.

    Raises:
        InvalidRequest, ContextLengthExceeded: names the field to change.
        ModelNotFound: no such model.
    """
    body = parse(ResponseBody, raw)
    for name, reason in _REFUSED.items():
        if getattr(body, name):
            raise InvalidRequest(f"{name}: {reason}; leave it out", param=name)
    caller = replace(caller, priority=body.priority or 0)
    # A gateway that takes the line over draws the same.
    seed = hashlib.blake2b(caller.request_id.encode(), digest_size=8).digest()
    asked = ask(
        body.model_copy(update={"store": False}),
        caller,
        response_id=response_id_of(caller.tenant, caller.request_id),
        created_at=int(time.time()),
        seed=int.from_bytes(seed, "little") >> 1,
        before=(),
        session_id="",
    )
    try:
        return BatchedResponse(asked, await prepare_chat(core, asked.chat_body(), caller))
    except TriremeError as error:
        raise as_a_response_calls_it(error) from None
