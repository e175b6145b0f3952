"""The gRPC face of the worker: token streams to gateways, and control by placement."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from trireme.errors import InvalidRequest
from trireme.runtime.serving import Context
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.wire.worker.v1 import worker_pb2_grpc as rpc
from trireme.worker.request_table import RequestTable
from trireme.worker.variant_plan import VariantPlan
from trireme.worker.variants import VariantTable

log = logging.getLogger(__name__)


class WorkerServicer(rpc.WorkerServicer):
    """Decode, hand over, encode."""

    def __init__(
        self,
        table: RequestTable,
        variants: VariantTable,
        *,
        plan: Callable[[pb.LoadVariantRequest], VariantPlan],
        drain: Callable[[float], Awaitable[int]],
    ) -> None:
        self._table = table
        self._variants = variants
        self._plan = plan
        self._drain = drain

    async def Connect(
        self, request_iterator: AsyncIterator[pb.GatewayMessage], context: Context
    ) -> AsyncIterator[pb.TokenBatch]:
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("hello") or not first.hello.gateway_id:
            raise InvalidRequest(
                "the first message of Connect must be hello with a gateway_id", param="hello"
            )
        gateway_id = first.hello.gateway_id
        box = self._table.outbox(gateway_id)
        stream = object()
        box.stream = stream
        box.displace()
        self._table.connected(gateway_id)
        log.info("gateway_connected", extra={"gateway_id": gateway_id})
        listener = asyncio.create_task(self._listen(request_iterator, gateway_id, box.displace))
        try:
            async for batch in box.batches(stream, until=listener):
                yield batch
        finally:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener
            if box.stream is stream:
                box.stream = None
            log.info("gateway_disconnected", extra={"gateway_id": gateway_id})

    async def _listen(
        self, messages: AsyncIterator[pb.GatewayMessage], gateway_id: str, wake: Callable[[], None]
    ) -> None:
        try:
            async for message in messages:
                self._handle(message, gateway_id)
        finally:
            wake()

    def _handle(self, message: pb.GatewayMessage, gateway_id: str) -> None:
        match message.WhichOneof("what"):
            case "confirm":
                if message.confirm.complete:
                    self._table.confirm_complete(message.confirm.request_id)
            case "attach":
                if not self._table.attach(message.attach.request_id, gateway_id):
                    self._table.outbox(gateway_id).mark_unknown(message.attach.request_id)
            case "stop":
                choice = message.stop.choice if message.stop.HasField("choice") else None
                self._table.stop(message.stop.request_id, choice)
            case _:
                log.warning("unexpected_message", extra={"gateway_id": gateway_id})

    async def LoadVariant(self, request: pb.LoadVariantRequest, context: Context) -> pb.LoadVariantResponse:
        return pb.LoadVariantResponse(load_s=await self._variants.load(self._plan(request)))

    async def UnloadVariant(
        self, request: pb.UnloadVariantRequest, context: Context
    ) -> pb.UnloadVariantResponse:
        await self._variants.unload(request.variant)
        return pb.UnloadVariantResponse()

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        return pb.DrainResponse(remaining=await self._drain(request.timeout_s))
