"""The thread that owns the engines: it alone touches them, one step after the other."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from trireme.engine import Engine, EngineStats, StepResult

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_ENGINE_BROKEN = 70
"""Exit status after an error that no fault barrier caught: what was in flight counts a crash."""
ENGINE_NICE = 10
"""Scheduling priority of the engine's thread; the event loops of all processes stay at 0."""


class EngineThread:
    """Runs the engines round robin; results and answers come back on the event loop.

    Args:
        deliver: called on the event loop with (variant, result, stats) after each step.
    """

    def __init__(self, deliver: Callable[[str, StepResult, EngineStats], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._engines: dict[str, Engine] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._alive_s = time.monotonic()
        self._worked: set[str] = set()
        """Variants that had work at their last turn."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the present step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def stalled_s(self) -> float:
        """Seconds since the thread last finished something; it turns twice a second when idle."""
        return time.monotonic() - self._alive_s

    def post(self, action: Callable[[dict[str, Engine]], None]) -> None:
        """Run `action(engines)` on the thread before its next step."""
        with self._wake:
            self._calls.append(lambda: action(self._engines))
            self._wake.notify()

    async def call(self, action: Callable[[dict[str, Engine]], T]) -> T:
        """Run `action(engines)` on the thread before its next step and await its result."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run(engines: dict[str, Engine]) -> None:
            try:
                result = action(engines)
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_succeed, future, result)

        self.post(run)
        return await future

    def _run(self) -> None:
        # Whoever carries tokens must not wait for a core behind those who compute the next ones.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENGINE_NICE)
        try:
            while not self._stopping:
                self._turn()
        except BaseException:
            log.critical("engine_broken", exc_info=True)
            logging.shutdown()
            os._exit(EXIT_ENGINE_BROKEN)

    def _turn(self) -> None:
        with self._wake:
            has_work = any(engine.has_work for engine in self._engines.values())
            if not (self._calls or has_work or self._worked & self._engines.keys()):
                self._wake.wait(timeout=0.5)
            calls, self._calls = self._calls, deque()
        self._alive_s = time.monotonic()
        for action in calls:
            action()
            self._alive_s = time.monotonic()
        for variant, engine in list(self._engines.items()):
            if engine.has_work:
                result = engine.step()
                self._alive_s = time.monotonic()
                self._loop.call_soon_threadsafe(self._hand_over, variant, result, engine.stats())
                self._worked.add(variant)
            elif variant in self._worked:
                # A cancel takes the last sequence without a step: what is told of load must follow.
                self._worked.discard(variant)
                self._loop.call_soon_threadsafe(self._hand_over, variant, StepResult(), engine.stats())

    def _hand_over(self, variant: str, result: StepResult, stats: EngineStats) -> None:
        try:
            self._deliver(variant, result, stats)
        except Exception:
            # The step's tokens are lost: going on would leave a gap in answers that nobody fills.
            log.critical("step_not_delivered", exc_info=True)
            logging.shutdown()
            os._exit(EXIT_ENGINE_BROKEN)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
