"""The worker's end of the link to its engine process: starts it, asks it, hears it, and falls with it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from trireme.runtime.child_processes import describe_exit
from trireme.worker.engine_messages import (
    Answer,
    Asked,
    Awaited,
    Command,
    Gone,
    LetGo,
    Question,
    Ready,
    Refused,
)
from trireme.worker.engine_process import EXIT_ENGINE_BROKEN, command
from trireme.worker.frames import FrameCutter, FrameKind, message, opened
from trireme.worker.step_news import StepNews, unpack

log = logging.getLogger(__name__)

START_S = 120.0
"""Importing the numeric library may take so long on a cold disk; then a silent process counts as stalled."""
STOP_S = 2.0
"""An engine in a long step is not waited for any longer: nothing of it is needed."""
_STATUS_S = 0.5


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who hears from the engines, on the event loop. What one of them raises ends the worker: the
    step's tokens would be lost, and going on would leave a gap in answers that nobody fills."""

    on_step: Callable[[StepNews], None]
    on_refused: Callable[[Refused], None]
    on_gone: Callable[[Gone], None]
    on_awaited: Callable[[Awaited], None]
    on_let_go: Callable[[LetGo], None]


class EngineClient(asyncio.Protocol):
    """The engines of this worker; its methods belong to the event loop."""

    def __init__(self, listeners: Listeners) -> None:
        self._listeners = listeners
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._cutter = FrameCutter()
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._call_ids = itertools.count()
        self._started_s = time.monotonic()
        self._heard_s: float | None = None
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def running(
        cls, listeners: Listeners, *, threads: int, patience_s: float = 0.5, log_level: str = "info"
    ) -> AsyncIterator[EngineClient]:
        """Start the engine process; ended when the block ends. If it ends before, so does this process.

        `patience_s`: how long a sequence whose turn is near waits for stored blocks that were announced.

        To be entered on the main thread, with whose end the kernel ends the child's.
        """
        near, far = socket.socketpair()
        near.setblocking(False)
        client = cls(listeners)
        client._socket = near
        try:
            words = command(link=far.fileno(), threads=threads, patience_s=patience_s, log_level=log_level)
            client._process = _start(words, far.fileno())
        finally:
            far.close()
        await asyncio.get_running_loop().create_connection(lambda: client, sock=near)
        try:
            yield client
        finally:
            await client._close()

    @property
    def pid(self) -> int:
        """Of the engine process."""
        assert self._process is not None
        return self._process.pid

    def stalled_s(self) -> float:
        """Seconds since the engines last finished something; idle ones tell of themselves twice a second."""
        now_s = time.monotonic()
        if self._heard_s is None:
            return max(0.0, now_s - self._started_s - START_S)
        return now_s - self._heard_s

    def send(self, what: Command) -> None:
        """Have it done before the engines' next step."""
        self._write(message(what))

    async def ask(self, question: Question) -> object:
        """What the question is answered with, before the engines' next step.

        Raises:
            TriremeError: what went wrong there.
        """
        call_id = next(self._call_ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self._write(message(Asked(call_id, question)))
        try:
            return await future
        finally:
            del self._calls[call_id]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        try:
            for kind, payload in self._cutter.feed(data):
                if kind == FrameKind.NEWS:
                    self._listeners.on_step(unpack(payload))
                elif kind == FrameKind.MESSAGE:
                    self._take(opened(payload))
        except Exception:
            log.critical("news_not_taken", exc_info=True)
            _exit()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closing:
            log.critical("engine_broken", extra={"how": self._how_it_ended()})
            _exit()

    def _write(self, data: bytes) -> None:
        """At once, if there is room: the transport would wait until all that is ready now has run."""
        assert self._transport is not None and self._socket is not None
        if self._transport.get_write_buffer_size() == 0:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass  # the transport waits for room
            except OSError as error:
                log.info("engine_does_not_listen", extra={"error": str(error)})  # its end is seen next
        if data:
            self._transport.write(data)

    def _take(self, what: object) -> None:
        match what:
            case Answer(call_id, value, error):
                future = self._calls.get(call_id)
                if future is None or future.done():
                    return  # who asked was cancelled
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(value)
            case Refused():
                self._listeners.on_refused(what)
            case Gone():
                self._listeners.on_gone(what)
            case Awaited():
                self._listeners.on_awaited(what)
            case LetGo():
                self._listeners.on_let_go(what)
            case Ready():
                log.info("engine_ready", extra={"pid": self.pid})
            case _:
                raise AssertionError(f"the engine process sent {what!r}")

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            return describe_exit(self._process.wait(_STATUS_S))
        except subprocess.TimeoutExpired:
            return "it closed the link and lives"

    async def _close(self) -> None:
        self._closing = True
        assert self._transport is not None and self._process is not None
        self._transport.close()
        deadline_s = time.monotonic() + STOP_S
        while self._process.poll() is None:
            if time.monotonic() > deadline_s:
                self._process.kill()
            await asyncio.sleep(0.02)


def _start(words: list[str], link: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=(link,))


def _exit() -> None:
    logging.shutdown()
    os._exit(EXIT_ENGINE_BROKEN)
