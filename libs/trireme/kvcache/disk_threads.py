"""Blocking calls to a disk, in threads that nobody ever has to wait for.

A disk may hang for seconds or for good. So the threads are daemons, a caller can give up on a call
while its thread still sits in it, and what the call uses (memory, a file) is let go of only when the
thread comes back.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from trireme.runtime.clock import Clock

log = logging.getLogger(__name__)

R = TypeVar("R")


class DiskCall(Generic[R]):
    """One call, from its submission to the return of its thread."""

    def __init__(self, work: Callable[[], R], outcome: asyncio.Future[R]) -> None:
        self.work = work
        self.outcome = outcome
        """Its result or error; an error of our own where it was given up."""
        self.started_s: float | None = None
        self.is_given_up = False
        self._claim = threading.Lock()
        self._on_return: list[Callable[[], None]] = []
        self._has_returned = False

    def when_returned(self, action: Callable[[], None]) -> None:
        """Do this once no thread is in the call: now, or later, or never."""
        if self._has_returned:
            action()
        else:
            self._on_return.append(action)

    def claim(self) -> bool:
        """Say that the call begins, or that it never will; False where that was said before."""
        return self._claim.acquire(blocking=False)

    def give_up(self, error: OSError) -> None:
        """Let whoever waits go on; a call that has not begun will not begin."""
        self.is_given_up = True
        if self.claim():
            self.finish(None, error)
        elif not self.outcome.done():
            self.outcome.set_exception(error)
            # Not everybody looks at the outcome of a write.
            self.outcome.exception()

    def finish(self, result: R | None, error: BaseException | None) -> None:
        """No thread is in the call, nor will be."""
        self._has_returned = True
        if not self.outcome.done():
            if error is not None:
                self.outcome.set_exception(error)
                self.outcome.exception()
            else:
                self.outcome.set_result(result)  # type: ignore[arg-type]
        for action in self._on_return:
            action()
        self._on_return.clear()


class DiskThreads:
    """A few threads with one queue; `on_error` hears of every call that the disk failed."""

    def __init__(self, count: int, *, name: str, clock: Clock, on_error: Callable[[OSError], None]) -> None:
        self._clock = clock
        self._on_error = on_error
        self._queue: queue.SimpleQueue[DiskCall[Any] | None] = queue.SimpleQueue()
        self._calls: dict[int, DiskCall[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Calls that were submitted and whose thread has not come back."""
        return len(self._calls)

    @property
    def stuck_s(self) -> float:
        """Seconds that the oldest call has been running; 0 where none is."""
        starts = [call.started_s for call in self._calls.values() if call.started_s is not None]
        return self._clock.monotonic_s() - min(starts) if starts else 0.0

    def submit(self, work: Callable[[], R]) -> DiskCall[R]:
        """Do `work` in one of the threads, after what was submitted before."""
        call = DiskCall(work, self._loop.create_future())
        self._calls[id(call)] = call
        self._queue.put(call)
        return call

    def give_up(self, error: OSError) -> None:
        """Give up all calls."""
        for call in list(self._calls.values()):
            if call.started_s is None:
                self._calls.pop(id(call), None)
            call.give_up(error)

    def close(self) -> None:
        """Let the threads end; those that are stuck are left behind."""
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if not call.claim():
                continue
            result, error = None, None
            call.started_s = self._clock.monotonic_s()
            try:
                result = call.work()
            except BaseException as raised:
                error = raised
            try:
                self._loop.call_soon_threadsafe(self._finish, call, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    def _finish(self, call: DiskCall[Any], result: Any, error: BaseException | None) -> None:
        self._calls.pop(id(call), None)
        if isinstance(error, OSError) and not call.is_given_up:
            # Before those who wait hear of it, and whether anybody waits or not.
            self._on_error(error)
        elif error is not None and not isinstance(error, OSError):
            log.error("disk_call_failed", exc_info=error)
        call.finish(result, error)
