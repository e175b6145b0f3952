"""A gRPC server that outlives calls whose path is no text.

grpcio's asyncio server decodes the path of every call that is not of a registered method in its one
accepting loop; bytes that are no UTF-8 end that loop, and with it the server and all its streams
(grpcio 1.85.1, `AioServer._server_main_loop`). Here calls of registered methods are accepted as ever,
since core itself finds their names; all others are accepted apart, and refused without a look at the
name. Code that registers its methods as generated code does is not affected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_NO_METHOD = "/"
"""What interceptors see in the place of an unknown method's name."""


class _Server(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(
        self, loop: asyncio.AbstractEventLoop, pool: Any, handlers: Any, interceptors: Any, *rest: Any
    ):
        super().__init__(loop, pool, handlers, interceptors, *rest)
        self._loop_of_calls = loop
        self._asked_first = tuple(interceptors or ())
        self._refusing: asyncio.Task[None] | None = None
        self._refusals: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method_bytes: bytes | None) -> Any:
        if method_bytes is not None:
            return super()._make_request_call_future(method_bytes)
        if self._refusing is None:
            self._refusing = self._loop_of_calls.create_task(self._refuse_unnamed())
        return self._loop_of_calls.create_future()  # The accepting loop never hears of one.

    async def _refuse_unnamed(self) -> None:
        nobody = cygrpc._MethodResolver([], {})
        while True:
            try:
                call = await self._request_call()
            except cygrpc._RequestCallError:
                if not self.is_running():
                    return
                continue
            loop = self._loop_of_calls
            refusal = cygrpc._handle_rpc(_NO_METHOD, nobody, self._asked_first, call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, _NO_METHOD))
            self._refusals.add(task)
            task.add_done_callback(self._refusals.discard)


def robust_server(make: Callable[..., grpc.aio.Server], **how: Any) -> grpc.aio.Server:
    """What `grpc.aio.server` makes, of the class above."""
    library = cygrpc.AioServer
    cygrpc.AioServer = _Server
    try:
        return make(**how)
    finally:
        cygrpc.AioServer = library
