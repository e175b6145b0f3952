"""The Open Inference Protocol, asked by Triton's own client: metadata, answers, streams, errors, cancels."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from tests.service.gateway_fleet import CHECKPOINT, REPOSITORY, FakeWorker, fleet
from trireme.gateway.oip.servicer import MAX_STREAM_REQUESTS
from trireme.runtime.shutdown import end_tasks
from trireme.wire.inference.v1 import inference_pb2 as wire
from trireme.wire.oip.v2 import oip_pb2 as pb
from trireme.wire.oip.v2.oip_pb2_grpc import GRPCInferenceServiceStub

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
TEXT = "return 1  # 😀 é"
IDS = TOKENIZER.encode(TEXT).ids
HANG_TOKENS = 7
"""As in `triton_client`."""


def stopped(worker: FakeWorker) -> set[str]:
    """The requests that the worker was told to stop."""
    return {m.stop.request_id for m in worker.messages if m.WhichOneof("what") == "stop"}


async def answer_all(worker: FakeWorker, begun: set[str]) -> None:
    """Every request gets the same text, token by token; those for HANG_TOKENS only begin."""
    while True:
        assignment = await worker.assigned.get()
        sampling = assignment.request.sampling
        if sampling.max_tokens == HANG_TOKENS:
            begun.add(assignment.request.request_id)
            worker.emit(assignment, ids=IDS[:2])
            continue
        rows = []
        if sampling.HasField("logprobs"):
            rows = [wire.PositionLogprobs(chosen=wire.TokenLogprob(token_id=i, logprob=-0.5)) for i in IDS]
        for choice in range(sampling.n):
            for index, token_id in enumerate(IDS):
                last = index == len(IDS) - 1
                worker.emit(
                    assignment,
                    choice=choice,
                    first=index,
                    ids=[token_id],
                    logprobs=rows[index : index + 1],
                    finish=wire.FINISH_REASON_STOP if last else None,
                    last=last and choice == sampling.n - 1,
                )
            await asyncio.sleep(0)


@asynccontextmanager
async def answering_gateway(
    redis_url: str, folder: Path, begun: set[str] | None = None
) -> AsyncIterator[tuple[str, FakeWorker]]:
    async with fleet(redis_url, folder) as world, world.gateway() as gateway:
        answering = asyncio.create_task(answer_all(world.workers[0], set() if begun is None else begun))
        try:
            yield gateway.grpc_address, world.workers[0]
        finally:
            await end_tasks([answering])


async def seen_by_triton(address: str) -> dict[str, Any]:
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "libs")))
    command = [sys.executable, "-m", "tests.service.triton_client", address]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, cwd=REPOSITORY
    )
    async with asyncio.timeout(120):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return dict(json.loads(out))


async def test_tritons_client_finds_what_it_knows(redis_url: str, tmp_path: Path) -> None:
    begun: set[str] = set()
    async with answering_gateway(redis_url, tmp_path, begun) as (address, worker):
        seen = await seen_by_triton(address)
        # Those that only began: of the stream that was left, and what was cancelled or out of time.
        async with asyncio.timeout(60):
            while len(begun) < 3 or not begun <= stopped(worker):
                await asyncio.sleep(0.05)
    assert seen["live"] == [True, True, True]
    assert seen["server"]["name"] == "trireme"
    assert seen["inputs"]["text_input"] == ["BYTES", ["1"]] and seen["inputs"]["stop_words"][1] == ["-1"]
    assert seen["outputs"][0] == "text_output"
    assert seen["config"] == ["py", {"decoupled": True}, len(seen["inputs"])]
    assert seen["whole"] == {"id": "r1", "text_output": ["x" + TEXT]}
    everything = seen["all"]
    rows = json.loads(everything.pop("logprobs")[0])
    assert [list(row) for row in rows] == [[str(token_id)] for token_id in IDS]
    assert everything == {
        "id": "",
        "text_output": [TEXT],
        "finish_reason": ["stop"],
        "cumulative_logprob": [-0.5 * len(IDS)],
        "num_input_tokens": [len(TOKENIZER.encode("x").ids)],
        "num_output_tokens": [len(IDS)],
    }
    assert seen["two"] == {
        "id": "",
        "num_output_tokens": [len(IDS)] * 2,
        "text_output": ["é" + TEXT] * 2,
    }
    assert seen["by_parameter"]["text_output"] == seen["matrix"] == ["x" + TEXT]
    check_refusals(seen["refused"])
    check_stream(seen["stream"])
    assert seen["cancelled"] == "StatusCode.CANCELLED"
    assert seen["aio"] == {"ids": ["0", "1", "2"]}


def check_refusals(refused: dict[str, str]) -> None:
    expected = {
        "model": "NOT_FOUND: no model 'none'",
        "version": "NOT_FOUND: py has the version '1' alone",
        "metadata": "NOT_FOUND: no model",
        "ready": "NOT_FOUND: no model",
        "no_text": "INVALID_ARGUMENT: text_input is missing",
        "dtype": "INVALID_ARGUMENT: max_tokens must be INT32, not 'FP32'",
        "shape": "INVALID_ARGUMENT: text_input must have the shape [1], not [2]",
        "empty": "INVALID_ARGUMENT: text_input must have the shape [1], not [0]",
        "unknown": "INVALID_ARGUMENT: there is no input 'image'",
        "twice": "INVALID_ARGUMENT: text_input is there twice",
        "range": "INVALID_ARGUMENT: temperature must be from 0 to 2",
        "not_utf8": "INVALID_ARGUMENT: text_input is not valid UTF-8",
        "json": "INVALID_ARGUMENT: sampling_parameters is not valid JSON",
        "field": "INVALID_ARGUMENT: sampling_parameters: 'q' is not known",
        "parameter": "INVALID_ARGUMENT: the parameter 'q' is not supported",
        "priority": "INVALID_ARGUMENT: priority: say it in sampling_parameters",
        "output": "INVALID_ARGUMENT: there is no output 'q'",
        "streaming": "INVALID_ARGUMENT: one response cannot stream",
        "long": "INVALID_ARGUMENT: the prompt has at least",
        "huge": "RESOURCE_EXHAUSTED: ",
    }
    # Refused at once where it cannot end in time, as a busy machine's fleet may find.
    late = refused.pop("deadline")
    assert late.startswith(("StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED")), late
    wrong = {k: v for k, v in refused.items() if not v.startswith(f"StatusCode.{expected.get(k)}")}
    assert not wrong
    assert refused.keys() == expected.keys()


def check_stream(stream: list[dict[str, Any]]) -> None:
    """Responses of three requests, mixed: one by pieces, one whole, one refused."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for found in stream:
        by_id.setdefault(found.pop("id"), []).append(found)
    assert [row["error"] for row in by_id["bad"]] == [
        "no model 'none' here; there are 'py', 'py-1m', 'py-1m-half'"
    ]
    pieces = by_id["s"]
    assert len(pieces) > 1 and "".join(row["text_output"][0] for row in pieces) == TEXT
    assert [row["final"] for row in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0]["finish_reason"] == ["None"] and pieces[-1]["finish_reason"] == ["stop"]
    assert by_id["w"] == [{"text_output": ["x" + TEXT], "final": True}]


def prompt(text: bytes = b"x", **changes: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="py", **changes)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text)
    tokens = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    tokens.contents.int_contents.append(32)
    return request


async def test_typed_contents_do_as_well_as_raw_ones(redis_url: str, tmp_path: Path) -> None:
    async with (
        answering_gateway(redis_url, tmp_path) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        response = await stub.ModelInfer(prompt(id="é"))
        assert response.raw_output_contents[0][4:].decode() == "x" + TEXT and response.id == "é"
        mixed = prompt()
        mixed.raw_input_contents.extend([b"\1\0\0\0x", b"\1\0\0\0"])
        torn = prompt()
        for tensor in torn.inputs:
            tensor.ClearField("contents")
        torn.raw_input_contents.extend([b"\xff\0\0\0x", b"\1\0\0\0"])
        vast = prompt()
        vast.inputs[1].shape[:] = [2**62, 2**62]
        for wrong, said in ((mixed, "not both"), (torn, "longer than"), (vast, "shape")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in str(caught.value.details())


async def test_a_stream_takes_more_requests_than_are_answered_at_once(redis_url: str, tmp_path: Path) -> None:
    async with (
        answering_gateway(redis_url, tmp_path) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        count = MAX_STREAM_REQUESTS + 10
        stream = GRPCInferenceServiceStub(channel).ModelStreamInfer(
            prompt(id=str(number)) for number in range(count)
        )
        ids = [response.infer_response.id async for response in stream]
        assert sorted(ids, key=int) == [str(number) for number in range(count)]


async def test_what_is_no_request_ends_a_stream_after_those_before_it(redis_url: str, tmp_path: Path) -> None:
    async with (
        answering_gateway(redis_url, tmp_path) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await stream.write(prompt().SerializeToString())
        await stream.write(b"\xff")
        response = pb.ModelStreamInferResponse.FromString(await stream.read())
        assert TEXT.encode() in response.infer_response.raw_output_contents[0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
