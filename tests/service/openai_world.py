"""A gateway and its surroundings, asked by OpenAI's own client."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.service.gateway_fleet import CHECKPOINT, FakeWorker, Fleet
from trireme.gateway.process import Gateway
from trireme.wire.bus.v1.facts_pb2 import Assignment
from trireme.wire.inference.v1 import inference_pb2 as wire

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
TEXT = "return 1  # 😀 é"
IDS = TOKENIZER.encode(TEXT).ids
USER = [{"role": "user", "content": "hi"}]


@dataclass
class World:
    fleet: Fleet
    worker: FakeWorker
    gateway: Gateway
    client: AsyncOpenAI
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}"

    async def serve(self, ids: list[int] = IDS, *, finish: int = wire.FINISH_REASON_STOP) -> Assignment:
        """Answer the next request with these tokens."""
        assignment = await self.worker.next_assignment()
        self.worker.answer(assignment, ids, finish=finish)
        return assignment

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, headers=headers) as response:
            raw = await response.read()
            return response.status, json.loads(raw) if raw[:1] == b"{" else raw, response.headers
