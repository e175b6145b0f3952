"""/v1/embeddings, asked by OpenAI's own client: every form of input, both forms of output, errors by name."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.service.gateway_fleet import CHECKPOINT, FakeWorker, fleet
from trireme.runtime.shutdown import end_tasks

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def vector_of(ids: list[int]) -> list[float]:
    """What stands for a model here: numbers that tell which ids came, as floats of 32 bits."""
    exact = [len(ids), sum(ids) / 7, ids[0] - 0.1]
    return list(struct.unpack("<3f", struct.pack("<3f", *exact)))


@asynccontextmanager
async def asked(redis_url: str, folder: Path, **settings: Any) -> AsyncIterator[AsyncOpenAI]:
    async def answer(worker: FakeWorker) -> None:
        while True:
            assignment = await worker.assigned.get()
            ids = list(assignment.request.prompt_token_ids)
            worker.emit(assignment, finish=1, embedding=vector_of(ids))

    async with fleet(redis_url, folder) as world, world.gateway(**settings) as gateway:
        answering = asyncio.create_task(answer(world.workers[0]))
        url = f"http://{gateway.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client
        await end_tasks([answering])


async def test_every_input_gives_its_vector(redis_url: str, tmp_path: Path) -> None:
    texts = ["for x in y", "é 😀"]
    ids = [TOKENIZER.encode(text).ids for text in texts]
    async with asked(redis_url, tmp_path) as client:
        for given, meant in ((texts[0], ids[:1]), (texts, ids), (ids[1], ids[1:]), (ids, ids)):
            for form in (None, "float", "base64"):
                options: Any = {} if form is None else {"encoding_format": form}
                answer = await client.embeddings.create(model="py", input=given, **options)  # type: ignore[arg-type]
                assert [row.index for row in answer.data] == list(range(len(meant)))
                assert [row.object for row in answer.data] == ["embedding"] * len(meant)
                expected = [vector_of(part) for part in meant]
                if form == "base64":
                    raw = [base64.b64decode(str(row.embedding)) for row in answer.data]
                    assert [list(struct.unpack("<3f", one)) for one in raw] == expected
                else:  # By itself the client asks for base64 and unpacks it.
                    assert [row.embedding for row in answer.data] == expected
                assert (answer.object, answer.model) == ("list", "py")
                count = sum(map(len, meant))
                assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)


async def test_more_texts_than_are_in_the_fleet_at_once(redis_url: str, tmp_path: Path) -> None:
    async with asked(redis_url, tmp_path, max_embeddings=70) as client:
        answer = await client.embeddings.create(model="py", input=[[number + 1] for number in range(70)])
        assert [row.embedding for row in answer.data] == [vector_of([number + 1]) for number in range(70)]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="py", input=["x"] * 71)
        assert caught.value.param == "input" and "1 to 70" in caught.value.message


async def test_what_cannot_be_is_refused_by_name(redis_url: str, tmp_path: Path) -> None:
    async with asked(redis_url, tmp_path) as client:
        for change, param in REFUSED:
            kind = openai.NotFoundError if param == "model" else openai.BadRequestError
            with pytest.raises(kind) as caught:
                await client.embeddings.create(**{"model": "py", "input": "x", **change})
            assert caught.value.param == param, (change, caught.value.body)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": [[1], []]}, "input"),
    ({"input": [5000]}, "input"),
    ({"input": "x " * 4000}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"dimensions": 8}, "dimensions"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"model": "none"}, "model"),
    ({"extra_body": {"truncate": True}}, "truncate"),
]
