"""The engine process's one loop: commands in, a step of each engine, news out.

One thread touches the engines. A second one reads checkpoints, so that other variants go on meanwhile.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from trireme.engine import Engine
from trireme.errors import RequestConflict, TriremeError
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.worker import engine_loading
from trireme.worker.engine_messages import (
    Add,
    Answer,
    Asked,
    Cancel,
    ExportBlocks,
    Gone,
    ImportBlocks,
    Load,
    Question,
    Ready,
    Refused,
    Unload,
)
from trireme.worker.frames import FrameCutter, FrameKind, frame, message, opened
from trireme.worker.served_engine import ResidencyLog, ServedEngine
from trireme.worker.step_news import pack
from trireme.worker.transfer_area import map_area
from trireme.worker.variant_plan import VariantPlan

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""An idle process says so often that it is alive."""
_READ_BYTES = 1 << 18


class EngineLoop:
    """Serves until the worker's end of the link closes.

    Args:
        link: connected to the worker, which reads all the time: a write may wait for it.
        area: descriptor of the transfer area.
        threads: of the numeric library.
    """

    def __init__(self, link: socket.socket, area: int, *, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._link = link
        self._area = map_area(area)
        self._engines: dict[str, ServedEngine] = {}
        self._cutter = FrameCutter()
        self._built: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(link.fileno(), select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)

    def run(self) -> None:
        """Serve until the link closes."""
        self._say(Ready())
        try:
            while self._hear():
                for served in list(self._engines.values()):
                    news = served.turn()
                    if news is not None:
                        self._link.sendall(frame(FrameKind.NEWS, pack(news)))
        except (BrokenPipeError, ConnectionResetError):
            log.info("worker_gone")

    def _hear(self) -> bool:
        """Do what was asked, waiting for it where there is nothing else to do; False at the link's end."""
        is_idle = not any(served.wants_a_turn for served in self._engines.values())
        ready = self._poll.poll(1000 * BEAT_S if is_idle else 0)
        if is_idle and not ready:
            self._beat()
        for descriptor, _ in ready:
            if descriptor == self._wake_fd:
                os.eventfd_read(self._wake_fd)
                while not self._built.empty():
                    self._built.get()()
                continue
            data = self._link.recv(_READ_BYTES)
            if not data:
                return False
            for _, payload in self._cutter.feed(data):
                self._obey(opened(payload))
        return True

    def _obey(self, command: object) -> None:
        match command:
            case Add():
                self._add(command)
            case Cancel(variant, handles):
                if variant in self._engines:
                    self._engines[variant].cancel(handles)
            case Asked(call_id, Load(plan)):
                threading.Thread(target=self._build, args=(call_id, plan), daemon=True).start()
            case Asked(call_id, question):
                self._answer(call_id, lambda: self._value_of(question))
            case _:
                raise AssertionError(f"the worker sent {command!r}")

    def _add(self, command: Add) -> None:
        handles = tuple(handle for _, handle in command.sequences)
        served = self._engines.get(command.variant)
        if served is None:
            self._say(Gone(handles))
            return
        try:
            served.add(AdmittedRequest.FromString(command.request), command.sequences)
        except TriremeError as error:
            self._say(Refused(handles, error.code, error.message))

    def _value_of(self, question: Question) -> object:
        match question:
            case Unload(variant):
                return self._free_if_idle(variant)
            case ImportBlocks(variant, blocks):
                served = self._engines.get(variant)
                if served is None:
                    return 0
                area = self._area
                return sum(
                    served.engine.import_block(block, area[offset : offset + length])
                    for block, offset, length in blocks
                )
            case ExportBlocks():
                return self._export(question)
            case _:
                raise AssertionError(f"the worker asked {question!r}")

    def _export(self, question: ExportBlocks) -> tuple[int, ...]:
        served = self._engines.get(question.variant)
        lengths = []
        for block, offset in question.blocks:
            payload = served.engine.export_block(block) if served is not None else None
            if payload is None or len(payload) > question.room_bytes:
                lengths.append(0)
                continue
            self._area[offset : offset + len(payload)] = payload
            lengths.append(len(payload))
        return tuple(lengths)

    def _free_if_idle(self, variant: str) -> bool:
        # One step, so that nothing is added to an engine between the look and its end.
        served = self._engines.get(variant)
        if served is not None and served.engine.has_work:
            return False
        self._engines.pop(variant, None)
        return True

    def _build(self, call_id: int, plan: VariantPlan) -> None:
        """On a thread of its own; the loop takes the engine over."""
        residency = ResidencyLog()
        try:
            engine = engine_loading.build(plan, residency)
        except Exception as error:
            failure = error
            self._hand_over(lambda: self._answer(call_id, lambda: _raise(failure)))
        else:
            self._hand_over(
                lambda: self._answer(call_id, lambda: self._install(plan.variant, engine, residency))
            )

    def _hand_over(self, action: Callable[[], None]) -> None:
        self._built.put(action)
        os.eventfd_write(self._wake_fd, 1)

    def _install(self, variant: str, engine: Engine, residency: ResidencyLog) -> object:
        if variant in self._engines:
            raise RequestConflict(f"variant {variant!r} is loaded already", param="variant")
        engine_loading.warm_up(engine, beat=self._beat)
        residency.take()  # nobody else's prompt is the probe's
        served = self._engines[variant] = ServedEngine(variant, engine, residency)
        return engine_loading.describe(engine), served.standing().figures

    def _answer(self, call_id: int, value: Callable[[], object]) -> None:
        try:
            answer = Answer(call_id, value())
        except TriremeError as error:
            answer = Answer(call_id, error=error)
        except Exception as error:
            log.exception("question_failed")
            answer = Answer(call_id, error=RuntimeError(repr(error)))  # what it was may not be picklable
        self._say(answer)

    def _say(self, what: object) -> None:
        self._link.sendall(message(what))

    def _beat(self) -> None:
        self._link.sendall(frame(FrameKind.BEAT))


def _raise(error: Exception) -> object:
    raise error
