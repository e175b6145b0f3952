"""A background response on real workers: its gateway dies, the text is the one of a quiet day."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from tests.fleet.conftest import Fleet, stopped
from trireme.bus.connection import Keys, open_redis
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

TOKENS = 600

ASKED: dict[str, Any] = {
    "model": "py",
    "input": "def main():",
    "max_output_tokens": TOKENS,
    "temperature": 0.8,
    "extra_body": {"seed": 7, "ignore_eos": True},
}


def client_of(address: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60)


async def driver_of(fleet: Fleet, gateways: list[ProcessRecord], response_id: str) -> ProcessRecord | None:
    """Which of these gateways drives a response; None where it has ended."""
    async with open_redis(str(fleet.state["redis_url"])) as redis:
        keys = Keys(str(fleet.state["bus_prefix"]))
        holder = await redis.hget(keys.work_holders("responses"), response_id)
    return next((gateway for gateway in gateways if holder == gateway.id.encode()), None)


async def check_that_a_response_outlives_its_gateway(fleet: Fleet) -> None:
    """Kill the gateway that drives a response; it is started again when this returns."""
    async with client_of(fleet.http[0]) as first:
        quiet = await first.responses.create(**ASKED)
        assert quiet.usage is not None and quiet.usage.output_tokens == TOKENS
        gateways = await fleet.living("gateway")
        victim = None
        while victim is None:  # The answer may be faster than its client.
            stream = await first.responses.create(**ASKED, background=True, stream=True)
            seen: list[Any] = []
            async for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
            response_id = seen[0].response.id
            with stopped(*(gateway.pid for gateway in gateways)):
                victim = await driver_of(fleet, gateways, response_id)
                if victim is not None:
                    os.kill(victim.pid, signal.SIGKILL)
    survivor = next(address for address in fleet.http if address != victim.http_address)
    async with client_of(survivor) as second:
        rest = await second.responses.retrieve(
            response_id, stream=True, starting_after=seen[-1].sequence_number
        )
        seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == quiet.output_text == seen[-1].response.output_text
    assert seen[-1].response.status == "incomplete" and seen[-1].response.usage.output_tokens == TOKENS
    async with client_of(victim.http_address) as back, asyncio.timeout(60):
        while True:  # The one that starts in its place knows the response as well.
            try:
                found = await back.responses.retrieve(response_id)
                break
            except OpenAIError:
                await asyncio.sleep(0.1)
    assert found.output_text == text
