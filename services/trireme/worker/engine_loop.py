"""The engine process's one loop: commands in, a step of each engine, news out.

One thread touches the engines. A second one reads checkpoints, so that other variants go on meanwhile.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from trireme.engine import EncoderEngine, Engine, SavedBlock
from trireme.engine.stored_blocks import let_go_of
from trireme.errors import RequestConflict, TriremeError
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.worker import engine_loading
from trireme.worker.engine_messages import (
    Add,
    Answer,
    Asked,
    Cancel,
    Gone,
    LetGo,
    Load,
    Offer,
    Question,
    Ready,
    Refused,
    SaveBlocks,
    Unload,
)
from trireme.worker.frames import FrameCutter, FrameKind, frame, message, opened
from trireme.worker.preload_rule import PreloadRule
from trireme.worker.served_engine import ResidencyLog, ServedEngine
from trireme.worker.shared_blocks import SharedBlocks, checksums
from trireme.worker.step_news import pack
from trireme.worker.variant_plan import VariantPlan

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""An idle process says so often that it is alive."""
STUCK_S = 0.001
"""Between two steps of engines that have work, all of which waits for the worker or for a copy."""
_READ_BYTES = 1 << 18


class EngineLoop:
    """Serves until the worker's end of the link closes.

    Args:
        link: connected to the worker, which reads all the time: a write may wait for it.
        threads: of the numeric library.
        patience_s: see `ServedEngine`.
    """

    def __init__(self, link: socket.socket, *, threads: int, patience_s: float) -> None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._link = link
        self._said_s = 0.0
        self._patience_s = patience_s
        self._blocks = SharedBlocks(self._let_go)
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
                        self._send(frame(FrameKind.NEWS, pack(news)))
                    awaited = served.awaited(now_s=time.monotonic())
                    if awaited is not None:
                        self._say(awaited)
        except (BrokenPipeError, ConnectionResetError):
            log.info("worker_gone")

    def _hear(self) -> bool:
        """Do what was asked, waiting for it where there is nothing else to do; False at the link's end."""
        busy = [served for served in self._engines.values() if served.wants_a_turn]
        is_idle = not busy
        rest_s = BEAT_S if is_idle else STUCK_S if all(served.is_stuck for served in busy) else 0
        ready = self._poll.poll(1000 * rest_s)
        if not ready and (is_idle or time.monotonic() - self._said_s > BEAT_S):
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
            case Offer():
                self._offer(command)
            case Asked(call_id, SaveBlocks() as question):
                self._save(call_id, question)
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
            request = AdmittedRequest.FromString(command.request)
            served.add(
                request,
                command.sequences,
                awaited_tokens=command.awaited_tokens,
                initial_queue=command.initial_queue,
            )
        except TriremeError as error:
            self._say(Refused(handles, error.code, error.message))

    def _value_of(self, question: Question) -> object:
        match question:
            case Unload(variant):
                return self._free_if_idle(variant)
            case _:
                raise AssertionError(f"the worker asked {question!r}")

    def _offer(self, command: Offer) -> None:
        served = self._engines.get(command.variant)
        stored = self._blocks.stored(command.chain) if command.chain is not None else ()
        if served is not None:
            served.offer(command.handles, stored)
        else:
            let_go_of(stored)

    def _let_go(self, what: LetGo) -> None:
        """On any thread."""
        self._hand_over(lambda: self._say(what))

    def _save(self, call_id: int, question: SaveBlocks) -> None:
        """Begin the copies; the answer follows them."""
        served = self._engines.get(question.variant)
        room_for = self._blocks.rooms(question) if served is not None else None
        if served is None or room_for is None:
            self._answer(call_id, lambda: checksums(question, ()))
            return
        engine = served.engine

        def on_saved(saved: tuple[SavedBlock, ...]) -> None:
            self._hand_over(lambda: self._answer(call_id, lambda: _saved(engine, question, saved)))

        engine.save([block_hash for block_hash, *_ in question.rooms], room_for, on_saved=on_saved)

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
            engine, rule = engine_loading.build(plan, residency)
        except Exception as error:
            failure = error
            self._hand_over(lambda: self._answer(call_id, lambda: _raise(failure)))
        else:
            self._hand_over(
                lambda: self._answer(call_id, lambda: self._install(plan.variant, engine, residency, rule))
            )

    def _hand_over(self, action: Callable[[], None]) -> None:
        self._built.put(action)
        os.eventfd_write(self._wake_fd, 1)

    def _install(
        self, variant: str, engine: Engine | EncoderEngine, residency: ResidencyLog, rule: PreloadRule | None
    ) -> object:
        if variant in self._engines:
            raise RequestConflict(f"variant {variant!r} is loaded already", param="variant")
        engine_loading.warm_up(engine, beat=self._beat)
        residency.take()  # nobody else's prompt is the probe's
        served = ServedEngine(variant, engine, residency, rule, patience_s=self._patience_s)
        self._engines[variant] = served
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
        self._send(message(what))

    def _beat(self) -> None:
        self._send(frame(FrameKind.BEAT))

    def _send(self, data: bytes) -> None:
        self._said_s = time.monotonic()
        self._link.sendall(data)


def _saved(engine: Engine | EncoderEngine, question: SaveBlocks, saved: tuple[SavedBlock, ...]) -> object:
    engine.poll()  # the blocks are free to be overwritten now; an idle engine takes no step to find out
    return checksums(question, saved)


def _raise(error: Exception) -> object:
    raise error
