"""What OpenAI's clients depend on, byte for byte as far as it does not differ from run to run.

Each case is asked twice: plainly, which is compared with a file of `tests/golden`, and by OpenAI's
own client, which must see the same. `make golden` writes the files anew; read the difference.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AsyncStream

from tests.service import golden
from tests.service.openai_world import IDS, USER, World
from tests.service.test_gateway_batches import CHAT, ended, line, rows, serving
from tests.service.test_gateway_openai import positions
from trireme.wire.inference.v1 import inference_pb2 as wire

SHOWN_HEADERS = ("content-type", "retry-after", "retry-after-ms", "x-should-retry", "allow")


async def nothing(_: World) -> None:
    """The call ends before it reaches a worker."""


async def stops(world: World) -> None:
    assignment = await world.worker.next_assignment()
    for choice in range(max(1, assignment.request.sampling.n)):
        last = choice == max(1, assignment.request.sampling.n) - 1
        world.worker.emit(assignment, choice=choice, ids=IDS, finish=wire.FINISH_REASON_STOP, last=last)


async def is_cut(world: World) -> None:
    world.worker.emit(await world.worker.next_assignment(), ids=IDS, finish=wire.FINISH_REASON_LENGTH)


async def tells_logprobs(world: World) -> None:
    assignment = await world.worker.next_assignment()
    world.worker.emit(assignment, ids=IDS[:2], logprobs=positions(IDS[:2]), finish=1)


async def breaks(world: World) -> None:
    assignment = await world.worker.next_assignment()
    before = await first_tokens(world)
    world.worker.emit(assignment, ids=IDS[:3])
    async with asyncio.timeout(60):  # The first token is at the client when the engine fails.
        while await first_tokens(world) == before:
            await asyncio.sleep(0.02)
    world.worker.emit(
        assignment, finish=wire.FINISH_REASON_ERROR, error=("request_failed", "the engine failed"), last=True
    )


async def first_tokens(world: World) -> str:
    """How many answers have begun."""
    async with world.http.get(world.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(text for text in lines if text.startswith("trireme_gateway_ttft_seconds_count"))


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any] | None
    serve: Callable[[World], Awaitable[None]]

    @property
    def streams(self) -> bool:
        return bool(self.body and self.body.get("stream"))

    async def ask(self, client: AsyncOpenAI) -> Any:
        """The same call by the SDK."""
        body = self.body or {}
        match self.path:
            case "/v1/chat/completions":
                return await client.chat.completions.create(**body)
            case "/v1/completions":
                return await client.completions.create(**body)
            case "/v1/responses":
                return await client.responses.create(**body)
            case "/v1/models":
                return await client.models.list()
        return await client.models.retrieve(self.path.removeprefix("/v1/models/"))


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SAY = {"model": "py", "messages": USER}
GO_ON = {"model": "py", "prompt": "x = "}
ASK = {"model": "py", "input": "hi"}
COMPLETE, TEXT_COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
CASES = [
    Case("chat_whole", COMPLETE, SAY, stops),
    Case("chat_of_two_choices", COMPLETE, {**SAY, "n": 2}, stops),
    Case("chat_logprobs", COMPLETE, {**SAY, "logprobs": True, "top_logprobs": 2}, tells_logprobs),
    Case("chat_stream", COMPLETE, {**SAY, "stream": True}, stops),
    Case("chat_stream_that_is_cut", COMPLETE, {**SAY, "stream": True}, is_cut),
    Case("chat_stream_usage", COMPLETE, {**SAY, **USAGE}, stops),
    Case("completion_whole", TEXT_COMPLETE, {**GO_ON, "echo": True}, stops),
    Case("completion_logprobs", TEXT_COMPLETE, {**GO_ON, "logprobs": 2}, tells_logprobs),
    Case("completion_stream_usage", TEXT_COMPLETE, {**GO_ON, **USAGE}, is_cut),
    Case("response_whole", RESPOND, {**ASK, "instructions": "be brief", "metadata": {"a": "b"}}, stops),
    Case("response_stream", RESPOND, {**ASK, "stream": True}, stops),
    Case("response_stream_that_is_cut", RESPOND, {**ASK, "stream": True, "store": False}, is_cut),
    Case("response_background_stream", RESPOND, {**ASK, "stream": True, "background": True}, stops),
    Case(
        "response_logprobs",
        RESPOND,
        {**ASK, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        tells_logprobs,
    ),
    Case("models", "/v1/models", None, nothing),
    Case("error_in_a_chat_stream", COMPLETE, {**SAY, "stream": True}, breaks),
    Case("error_in_a_response_stream", RESPOND, {**ASK, "stream": True}, breaks),
    Case("error_out_of_range", COMPLETE, {**SAY, "temperature": 9}, nothing),
    Case("error_model_not_found", COMPLETE, {**SAY, "model": "none"}, nothing),
    Case("error_model_card_not_found", "/v1/models/none", None, nothing),
    Case("error_context_length_exceeded", TEXT_COMPLETE, {**GO_ON, "max_tokens": 30000}, nothing),
    Case("error_previous_response_not_found", RESPOND, {**ASK, "previous_response_id": "resp_none"}, nothing),
]


async def on_the_wire(world: World, case: Case) -> dict[str, Any]:
    """The answer as it came."""
    serving_it = asyncio.ensure_future(case.serve(world))
    method = "GET" if case.body is None else "POST"
    async with world.http.request(method, world.url + case.path, json=case.body) as response:
        raw = (await response.read()).decode()
        headers = {name: response.headers[name] for name in SHOWN_HEADERS if name in response.headers}
    await serving_it
    answer: Any = json.loads(raw) if raw.startswith("{") else []
    for event in raw.removesuffix("\n\n").split("\n\n") if answer == [] else ():
        fields = dict(text.split(": ", 1) for text in event.split("\n") if not text.startswith(":"))
        if not fields:
            continue  # A comment.
        data = fields.pop("data")
        answer.append({**fields, "data": data if data == "[DONE]" else json.loads(data)})
    return {"request": case.body, "status": response.status, "headers": headers, "answer": answer}


async def by_the_sdk(world: World, case: Case) -> Any:
    """What the SDK makes of it: objects as they came, or the error that it raises."""
    serving_it = asyncio.ensure_future(case.serve(world))
    events: list[Any] = []
    try:
        found = await case.ask(world.client)
        if not isinstance(found, AsyncStream):
            return found.to_dict()
        async for event in found:
            events.append(event.to_dict())
        return events
    except openai.APIError as error:
        fields = {name: getattr(error, name, None) for name in ("status_code", "code", "param", "type")}
        return {"raises": type(error).__name__, **fields, "after": events}
    finally:
        await serving_it


async def test_calls_are_answered_as_ever(world: World) -> None:
    for case in CASES:
        await answered_as_ever(world, case)


async def answered_as_ever(world: World, case: Case) -> None:
    found = await on_the_wire(world, case)
    seen = golden.normalised(await by_the_sdk(world, case))
    answer = golden.normalised(found["answer"])
    if isinstance(answer, list):
        answer = [event["data"] for event in answer if event["data"] != "[DONE]"]
    if isinstance(seen, dict) and "raises" in seen:
        last = answer[-1] if isinstance(answer, list) else answer
        assert {name: seen[name] for name in ("code", "param", "type")} == {
            name: last["error"][name] for name in ("code", "param", "type")
        }
        assert seen.pop("after") == (answer[:-1] if isinstance(answer, list) else [])
        found["sdk"] = seen
    else:
        assert seen == answer
    golden.compare(case.name, found)


@pytest.mark.parametrize("world", [{"max_inflight": 0, "retry_after_s": 0.7}], indirect=True)
async def test_a_full_gateway_says_when_to_come_back(world: World) -> None:
    case = Case("error_overloaded", COMPLETE, SAY, nothing)
    found = await on_the_wire(world, case)
    headers = found["headers"]
    after_s, after_ms = int(headers["retry-after"]), int(headers["retry-after-ms"])
    assert 0 < after_ms <= after_s * 1000 <= 120_000, "what the SDK obeys"
    headers |= {"retry-after": "<seconds>", "retry-after-ms": "<milliseconds>"}
    golden.compare(case.name, found)
    with pytest.raises(openai.RateLimitError):
        await case.ask(world.client)


async def test_without_a_key_the_error_is_of_the_sdks_kind(world: World, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("tenants: {}\n")
    async with world.fleet.gateway(keys=keys) as gateway:
        url = f"http://{gateway.http_address}"
        found = {}
        for name, headers in (("no_key", {}), ("unknown_key", {"Authorization": "Bearer trk_none"})):
            async with world.http.post(url + COMPLETE, json=SAY, headers=headers) as response:
                shown = {key: response.headers[key] for key in SHOWN_HEADERS if key in response.headers}
                shown["www-authenticate"] = response.headers["www-authenticate"]
                found[name] = {"status": response.status, "headers": shown, "answer": await response.json()}
        golden.compare("error_invalid_api_key", {"request": SAY, **found})
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="trk_none", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.chat.completions.create(**SAY)
        answer = found["unknown_key"]["answer"]["error"]
        assert {name: getattr(refused.value, name) for name in ("code", "param", "type")} == {
            name: answer[name] for name in ("code", "param", "type")
        }


async def test_a_leaving_gateway_says_so(world: World) -> None:
    await world.gateway.core.leave(drain_s=0)
    case = Case("error_leaving", COMPLETE, SAY, nothing)
    golden.compare(case.name, await on_the_wire(world, case))
    with pytest.raises(openai.InternalServerError):
        await case.ask(world.client)


async def test_the_life_of_a_stored_response(world: World) -> None:
    responses = world.client.responses
    life: dict[str, Any] = {"created": (await responses.create(**ASK, background=True)).to_dict()}
    response_id = life["created"]["id"]
    await world.worker.next_assignment()
    life["cancelled"] = (await responses.cancel(response_id)).to_dict()
    life["events"] = [e.to_dict() async for e in await responses.retrieve(response_id, stream=True)]
    life["input_items"] = (await responses.input_items.list(response_id)).to_dict()
    async with world.http.delete(f"{world.url}/v1/responses/{response_id}") as deleted:
        life["deleted"] = await deleted.json()
    async with world.http.get(f"{world.url}/v1/responses/{response_id}") as gone:
        life["gone"] = [gone.status, await gone.json()]
    life["gone"][1]["error"]["message"] = "<names the response>"
    golden.compare("response_life", life)


async def test_the_life_of_a_batch(world: World) -> None:
    client = world.client
    data = "\n".join(json.dumps(row) for row in (line("good"), line("bad", temperature=9))).encode()
    file = await client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    life: dict[str, Any] = {"file": file.to_dict()}
    async with serving(world):
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
        )
        made = batch.to_dict()
        same = ("id", "object", "endpoint", "completion_window", "input_file_id", "metadata", "expires_at")
        life["created"] = {name: made[name] for name in same}
        done = await ended(client, batch.id)
    life["completed"] = done.to_dict()
    life["output"] = await rows(client, done.output_file_id)
    life["errors"] = await rows(client, done.error_file_id)
    for row in life["output"] + life["errors"]:
        row["response"]["request_id"] = "<request>"
    life["output"][0]["response"]["body"]["id"] = "chatcmpl-<request>"
    assert done.output_file_id is not None
    # Its length is that of the measured times, too.
    output_file = await client.files.retrieve(done.output_file_id)
    assert output_file.bytes == len((await client.files.content(done.output_file_id)).content)
    life["output_file"] = {**output_file.to_dict(), "bytes": "<bytes>"}
    life["deleted"] = (await client.files.delete(file.id)).to_dict()
    failed = await client.batches.create(
        input_file_id=(await client.files.create(file=b"{", purpose="batch")).id,
        endpoint=CHAT,
        completion_window="24h",
    )
    life["failed"] = (await ended(client, failed.id)).to_dict()
    life["listed"] = {**(await client.batches.list(limit=1)).to_dict(), "data": "<batches>"}
    golden.compare("batch_life", life)
