"""A gRPC server whose callers send bytes that are no message: their fault, said so, and no crash."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest

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
