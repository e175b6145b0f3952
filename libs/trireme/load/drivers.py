"""Sends one planned request and writes down what came back: over gRPC, or over OpenAI's HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp
import grpc

from trireme.client.credentials import call_metadata, client_ssl_context, open_gateway
from trireme.load.outcome import Outcome
from trireme.load.plan import PlannedRequest
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1 import inference_pb2_grpc as rpc

Driver = Callable[[PlannedRequest], Awaitable[Outcome]]
Watcher = Callable[[Outcome], None]
"""Given each outcome when its request is sent; it fills while the answer comes."""

TENANT_HEADER = "x-trireme-tenant"


@asynccontextmanager
async def grpc_driver(
    addresses: Sequence[str],
    *,
    model: str,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    api_key: str | None = None,
    watch: Watcher | None = None,
) -> AsyncIterator[Driver]:
    """Spread requests over the gateways' gRPC ports, round robin."""
    credentials = call_metadata(api_key)
    channels = [open_gateway(address, (), None) for address in addresses]
    stubs = [rpc.InferenceStub(channel) for channel in channels]

    async def drive(planned: PlannedRequest) -> Outcome:
        request = pb.GenerateRequest(
            model=model,
            session_id=planned.session_id,
            sampling=pb.SamplingParameters(
                max_tokens=planned.max_tokens, temperature=temperature, ignore_eos=ignore_eos, seed=1
            ),
        )
        if isinstance(planned.prompt, str):
            request.text = planned.prompt
        else:
            request.token_ids.ids.extend(planned.prompt)
        metadata = (*credentials, *(((TENANT_HEADER, planned.tenant),) if planned.tenant else ()))
        outcome = Outcome(index=planned.index, started_s=time.monotonic())
        if watch is not None:
            watch(outcome)
        try:
            call = stubs[planned.index % len(stubs)].Generate(request, metadata=metadata)
            async for response in call:
                note_event(outcome, response)
        except grpc.aio.AioRpcError as error:
            outcome.error = _trailer(error, "trireme-error-code") or error.code().name.lower()
            after_ms = _trailer(error, "retry-after-ms")
            outcome.retry_after_s = float(after_ms) / 1000 if after_ms else None
        outcome.ended_s = time.monotonic()
        return outcome

    try:
        yield drive
    finally:
        for channel in channels:
            await channel.close(None)


def _trailer(error: grpc.aio.AioRpcError, name: str) -> str:
    for key, value in error.trailing_metadata():  # type: ignore[misc]  # the stubs miss its iterator
        if key == name:  # type: ignore[has-type]
            return str(value)  # type: ignore[has-type]
    return ""


def note_event(outcome: Outcome, response: pb.GenerateResponse) -> None:
    """Write one event of the answer's stream into the outcome."""
    match response.WhichOneof("event"):
        case "delta":
            count = len(response.delta.token_ids)
            outcome.arrivals.append((time.monotonic(), count))
            outcome.answer_tokens += count
            outcome.text += response.delta.text
        case "accepted":
            outcome.prompt_tokens = response.accepted.prompt_tokens
        case "paused":
            outcome.pauses += 1
        case "summary":
            outcome.note_usage(response.summary.usage)
            outcome.paused_s = response.summary.timings.paused_s


@asynccontextmanager
async def openai_driver(
    base_url: str,
    *,
    model: str,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    api_key: str | None = None,
    watch: Watcher | None = None,
) -> AsyncIterator[Driver]:
    """Stream `/v1/completions` of any OpenAI-compatible server; tokens are counted by its usage chunk.

    A server that does not know `ignore_eos` is asked without it.
    """
    headers = dict(call_metadata(api_key))
    secure = client_ssl_context(None) if base_url.startswith("https://") else None
    connector = aiohttp.TCPConnector(limit=0, ssl=secure if secure is not None else True)
    session = aiohttp.ClientSession(
        headers=headers, connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    )

    async def drive(planned: PlannedRequest) -> Outcome:
        body: dict[str, object] = {
            "model": model,
            "prompt": planned.prompt if isinstance(planned.prompt, str) else list(planned.prompt),
            "max_tokens": planned.max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            body["ignore_eos"] = True
        extra = {TENANT_HEADER: planned.tenant} if planned.tenant else None
        outcome = Outcome(index=planned.index, started_s=time.monotonic())
        if watch is not None:
            watch(outcome)
        try:
            async with session.post(f"{base_url}/completions", json=body, headers=extra) as response:
                if response.status != 200:
                    outcome.error = f"http_{response.status}"
                else:
                    async for line in response.content:
                        if line.startswith(b"data: ") and line[6:7] == b"{":
                            _note_chunk(outcome, json.loads(line[6:]))
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome.error = type(error).__name__
        outcome.ended_s = time.monotonic()
        # A server that reports no usage is taken to send a token per chunk, as those servers do.
        outcome.answer_tokens = outcome.answer_tokens or len(outcome.arrivals)
        return outcome

    try:
        yield drive
    finally:
        await session.close()


def _note_chunk(outcome: Outcome, chunk: dict[str, object]) -> None:
    if "error" in chunk:
        outcome.error = "error_in_stream"
        return
    choices = chunk.get("choices")
    if isinstance(choices, list) and choices and choices[0].get("text"):
        outcome.arrivals.append((time.monotonic(), 1))
        outcome.text += choices[0]["text"]
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        outcome.answer_tokens = usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens") or 0
        own = usage.get("trireme") or {}
        outcome.joules = own.get("joules", 0.0)
        outcome.grams_co2e = own.get("grams_co2e", 0.0)
