"""A gRPC server whose callers send bytes that are no message: their fault, said so, and no crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest

from benchmarks.hostile.raw_connections import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    call_headers,
    exchange,
    frame,
    header_block,
)
from trireme.runtime.health import HealthReporter
from trireme.runtime.serving import grpc_server
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.wire.worker.v1 import worker_pb2_grpc as rpc

NO_MESSAGE = [b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\xff" * 40]


class Echo(rpc.WorkerServicer):
    """Answers each message of a stream; the other methods are those of nobody."""

    async def Connect(
        self, request_iterator: AsyncIterator[pb.GatewayMessage], context: Any
    ) -> AsyncIterator[pb.TokenBatch]:
        async for message in request_iterator:
            yield pb.TokenBatch(worker_id=message.hello.gateway_id)


@pytest.mark.parametrize("raw", NO_MESSAGE, ids=repr)
async def test_a_stream_ends_where_a_message_is_none(raw: bytes) -> None:
    register = partial(rpc.add_WorkerServicer_to_server, Echo())
    health = HealthReporter({})
    async with (
        grpc_server("127.0.0.1:0", [register], service_names=[], health=health, drain_s=0.1) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = channel.stream_stream("/trireme.wire.worker.v1.Worker/Connect")()
        await call.write(pb.GatewayMessage(hello=pb.Hello(gateway_id="g")).SerializeToString())
        assert pb.TokenBatch.FromString(await call.read()).worker_id == "g"
        await call.write(raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "path", [b"/a/\xff\xfe", b"\xaf", b"/trireme.wire.worker.v1.Worker/Conn\xc3", b"/a/b"]
)
async def test_a_path_that_is_no_text_ends_nobody_elses_stream(path: bytes) -> None:
    register = partial(rpc.add_WorkerServicer_to_server, Echo())
    health = HealthReporter({})
    async with (
        grpc_server("127.0.0.1:0", [register], service_names=[], health=health, drain_s=0.1) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = rpc.WorkerStub(channel)
        call = stub.Connect()
        for number in range(3):
            await call.write(pb.GatewayMessage(hello=pb.Hello(gateway_id=str(number))))
            assert (await call.read()).worker_id == str(number)
            headers = header_block([*call_headers("/")[:2], (b":path", path), *call_headers("/")[3:]])
            sent = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS | END_STREAM, 1, headers)
            answer = await asyncio.to_thread(exchange, address, sent)
            assert b"grpc-status\x0212" in answer  # UNIMPLEMENTED
        await call.done_writing()
        again = rpc.WorkerStub(channel).Connect()  # The server goes on accepting calls.
        await again.write(pb.GatewayMessage(hello=pb.Hello(gateway_id="after")))
        assert (await again.read()).worker_id == "after"
