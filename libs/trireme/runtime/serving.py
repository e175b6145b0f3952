"""A gRPC server with health, reflection, limits and the mapping of errors to statuses."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trireme.errors import InvalidRequest, TriremeError
from trireme.runtime.health import HealthReporter
from trireme.runtime.service_rights import Check, rights_by_certificate
from trireme.runtime.status import GRPC_CODE
from trireme.runtime.tls import Certificates, fleet_certificates
from trireme.runtime.unnamed_calls import robust_server

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest gRPC message that a server takes; the gateway limits prompts and bodies far below it."""

Register = Callable[[grpc.aio.Server], None]
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Ends a call with the status of the TriremeError that its handler raised.

    With `check` each call is checked first, before its message is read.
    """

    def __init__(self, check: Check | None = None) -> None:
        self._check = check

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        read = _reader(handler, self._check, handler_call_details.method)
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = _STREAM_OUT[handler.request_streaming]
            return make(_guard_stream(inner, read), None, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = _UNARY_OUT[handler.request_streaming]
        return make(_guard_unary(inner, read), None, handler.response_serializer)


_STREAM_OUT: dict[bool, Callable[..., Any]] = {
    True: grpc.stream_stream_rpc_method_handler,
    False: grpc.unary_stream_rpc_method_handler,
}
_UNARY_OUT: dict[bool, Callable[..., Any]] = {
    True: grpc.stream_unary_rpc_method_handler,
    False: grpc.unary_unary_rpc_method_handler,
}


Read = Callable[[Any, Context], Any]


def _reader(handler: Any, check: Check | None, method: str) -> Read:
    """Makes what the method takes of what came: a message of its bytes, or an iterator of them.

    The library's own reading would end a call whose bytes are no message with UNKNOWN.
    """
    parse = handler.request_deserializer

    def read(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError as error:
            raise InvalidRequest("the request is not a message of this method") from error

    async def read_each(raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in raws:
            yield read(raw)

    made = read_each if handler.request_streaming else read
    if check is None:
        return lambda came, _: made(came)

    def read_if_allowed(came: Any, context: Context) -> Any:
        check(method, context)
        return made(came)

    return read_if_allowed


def _guard_unary(inner: Callable[..., Awaitable[Any]], read: Read) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await inner(read(request, context), context)
        except TriremeError as error:
            await abort(context, error)

    return call


def _guard_stream(inner: Callable[..., Any], read: Read) -> Callable[..., Any]:
    async def call_writing(request: Any, context: Context) -> None:
        try:
            await inner(read(request, context), context)
        except TriremeError as error:
            await abort(context, error)

    if not inspect.isasyncgenfunction(inner):
        return call_writing  # It writes its responses by itself.

    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in inner(read(request, context), context):
                yield response
        except TriremeError as error:
            await abort(context, error)

    return call


async def abort(context: Context, error: TriremeError) -> None:
    """End the call with the error's status; its code and hints travel as trailing metadata."""
    metadata = [("trireme-error-code", error.code)]
    if error.param is not None:
        metadata.append(("trireme-error-param", error.param))
    if error.retry_after_s is not None:
        metadata.append(("retry-after-ms", str(int(error.retry_after_s * 1000))))
    await context.abort(GRPC_CODE[error.kind], error.message, tuple(metadata))


@asynccontextmanager
async def grpc_server(
    listen: str,
    registrations: Sequence[Register],
    *,
    service_names: Sequence[str],
    health: HealthReporter,
    drain_s: float = 5.0,
    max_concurrent_rpcs: int | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]
    for_clients: bool = False,
    certificates: Certificates | None = None,
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the bound host:port (port 0 picks a free one).

    A server for services asks for the fleet's certificates where there are some, and answers each
    service what `service_rights` lets it call; one `for_clients` shows `certificates`, or speaks
    plaintext.

    On leaving, health says NOT_SERVING first, then calls have `drain_s` to end.
    """
    shown = certificates if for_clients else fleet_certificates()
    check = rights_by_certificate(shown.files.name) if shown is not None and not for_clients else None
    server = robust_server(
        grpc.aio.server,
        interceptors=[ErrorInterceptor(check), *interceptors],
        maximum_concurrent_rpcs=max_concurrent_rpcs,
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", 0),
        ],
    )
    for register in registrations:
        register(server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = [*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    if shown is None:
        port = server.add_insecure_port(listen)
    else:
        port = server.add_secure_port(listen, shown.server_credentials())
    host = listen.rpartition(":")[0]
    await server.start()
    await health.refresh()
    refresher = asyncio.create_task(health.run())
    try:
        yield f"{host}:{port}"
    finally:
        refresher.cancel()
        await health.stop_serving()
        await server.stop(drain_s)
