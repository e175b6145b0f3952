"""Copies of KV beside the compute: one thread in, one thread out, never on the critical path.

A copy is a generator that yields after each part (a group of blocks, a layer) the bytes it
moved. Its thread runs it to the end, in the order of submission; on a GPU the thread drives a
stream of its own. The engine's thread submits, polls at the start of a step, and joins a part
only where it cannot go on without it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from trireme.engine.copy_streams import CopyStream, Mark, stream_factory
from trireme.errors import InvalidConfiguration

log = logging.getLogger(__name__)

Parts = Callable[[CopyStream], Generator[int, None, None]]
"""The work of a copy; yields the bytes of each part once it was given to the stream. Closed
before its end where the copy is cancelled."""

_FORGETTING = 0.8
"""Weight of older copies in the measured bandwidth, per copy."""
_STOP_S = 5.0
"""Longest wait for a thread to end."""


class CopyFailed(Exception):
    """A copy ended without its data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A modelled link between device and host memory, for tests and experiments without a GPU.

    Raises InvalidConfiguration: a rate is not above 0.
    """

    in_bytes_per_s: float | None = None
    """Host to device; None: as fast as the memory is."""
    out_bytes_per_s: float | None = None
    """Device to host."""

    def __post_init__(self) -> None:
        for rate in (self.in_bytes_per_s, self.out_bytes_per_s):
            if rate is not None and not rate > 0:
                raise InvalidConfiguration(f"a link moves {rate} bytes per second; it must be more than 0")


class Copy:
    """One submitted copy, seen from the engine's thread."""

    def __init__(self, parts: Parts, fence: Mark, then: Callable[[Copy], None]) -> None:
        self.parts: Parts | None = parts
        self.fence = fence
        self.then = then
        """Called by `KvCopies.poll` once nothing of the copy runs any more."""
        self.marks: list[Mark] = []
        """Of the parts that were issued; appended to by the copy's thread."""
        self.num_bytes = 0
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.is_over = False
        """Nothing runs any more: all is copied, or it failed or was cancelled."""

    @property
    def is_complete(self) -> bool:
        """All of it was copied."""
        return self.is_over and self.error is None and not self.is_cancelled

    def cancel(self) -> None:
        """Stop after the part under way. What it touches must stay untouched until it is over."""
        self.is_cancelled = True


class Bandwidth:
    """Bytes per second while bytes moved, the newest copies first."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """A copy moved so much in this time."""
        self._bytes = _FORGETTING * self._bytes + num_bytes
        self._seconds = _FORGETTING * self._seconds + seconds

    @property
    def bytes_per_s(self) -> float:
        """0 before the first copy."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0


class _Lane:
    """One direction: a queue and the thread that serves it, started with the first copy."""

    def __init__(
        self,
        name: str,
        make_stream: Callable[[], CopyStream],
        bytes_per_s: float | None,
        progress: threading.Condition,
    ) -> None:
        self.name = name
        self.stream = make_stream()
        self.bytes_per_s = bytes_per_s
        self.progress = progress
        self.bandwidth = Bandwidth()
        self.over: deque[Copy] = deque()
        self.queue: SimpleQueue[Copy | None] = SimpleQueue()
        self.link_free_s = 0.0
        self.thread: threading.Thread | None = None
        self.is_stopping = False

    def submit(self, copy: Copy) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=_serve, args=(self,), name=self.name, daemon=True)
            self.thread.start()
        self.queue.put(copy)

    def stop(self) -> None:
        """End after the part under way; copies not begun count as cancelled."""
        self.is_stopping = True
        self.queue.put(None)
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=_STOP_S)

    def run(self, copy: Copy) -> None:
        """Copy part by part."""
        parts, copy.parts = copy.parts, None  # what the parts hold on to is let go with them
        assert parts is not None
        if self.is_stopping:
            copy.cancel()
        with self.stream.scope(copy.fence):
            # What precedes the bytes, such as checking them, is part of their way.
            counted_s = started_s = time.perf_counter()
            work = parts(self.stream)
            try:
                while not copy.is_cancelled and (num_bytes := next(work, None)) is not None:
                    if num_bytes:
                        self._pace(num_bytes, started_s)
                        now_s = time.perf_counter()
                        copy.num_bytes += num_bytes
                        copy.seconds += now_s - counted_s
                        counted_s = now_s
                    with self.progress:
                        copy.marks.append(self.stream.mark())
                        self.progress.notify_all()
                    if self.is_stopping:
                        copy.cancel()
                    started_s = time.perf_counter()
            finally:
                work.close()
                started_s = time.perf_counter()
                self.stream.synchronize()
        if copy.num_bytes:
            copy.seconds += time.perf_counter() - started_s
            self.bandwidth.add(copy.num_bytes, copy.seconds)

    def _pace(self, num_bytes: int, started_s: float) -> None:
        """Hold the part back until a link of the modelled rate would have brought it."""
        if self.bytes_per_s is None:
            return
        self.link_free_s = max(self.link_free_s, started_s) + num_bytes / self.bytes_per_s
        late_s = self.link_free_s - time.perf_counter()
        if late_s > 0:
            time.sleep(late_s)


def _serve(lane: _Lane) -> None:
    with torch.inference_mode():
        while (copy := lane.queue.get()) is not None:
            try:
                lane.run(copy)
            except Exception as error:
                # The owner of the copy decides what its loss means; the thread serves the others.
                log.exception("kv_copy_failed", extra={"direction": lane.name})
                copy.error = error
            with lane.progress:
                copy.is_over = True
                lane.over.append(copy)
                lane.progress.notify_all()


def _stop(*lanes: _Lane) -> None:
    for lane in lanes:
        lane.stop()


class KvCopies:
    """All copies of one engine.

    Args:
        device: of the KV memory; decides what the copies run on.
        link: a modelled link in place of the memory's own speed.
    """

    def __init__(self, device: torch.device, link: Link | None = None) -> None:
        link = link or Link()
        make_stream = stream_factory(device)
        self._progress = threading.Condition()
        self._in = _Lane("kv-in", make_stream, link.in_bytes_per_s, self._progress)
        self._out = _Lane("kv-out", make_stream, link.out_bytes_per_s, self._progress)
        self._num_open = 0
        self._joined_s = 0.0
        self._close = weakref.finalize(self, _stop, self._in, self._out)

    @property
    def num_open(self) -> int:
        """Copies that were submitted and not yet seen to be over."""
        return self._num_open

    @property
    def in_bytes_per_s(self) -> float:
        """Measured, host to device; 0 before the first copy."""
        return self._in.bandwidth.bytes_per_s

    @property
    def out_bytes_per_s(self) -> float:
        """Measured, device to host."""
        return self._out.bandwidth.bytes_per_s

    @property
    def stall_s(self) -> float:
        """Seconds that compute waited in `join`, so far."""
        self._joined_s += self._in.stream.waited_s()
        return self._joined_s

    def copy_in(self, parts: Parts, then: Callable[[Copy], None]) -> Copy:
        """Host to device: returns at once; `then` is called by a later `poll`."""
        return self._submit(self._in, parts, then)

    def copy_out(self, parts: Parts, then: Callable[[Copy], None]) -> Copy:
        """Device to host, likewise."""
        return self._submit(self._out, parts, then)

    def poll(self) -> None:
        """Take note of the copies that are over: calls their `then`. Never waits."""
        for lane in (self._out, self._in):
            while lane.over:
                copy = lane.over.popleft()
                self._num_open -= 1
                copy.then(copy)

    def wait(self, timeout_s: float) -> None:
        """Wait until some copy is over or some part is done, at most so long."""
        if self._num_open:
            with self._progress:
                if not (self._in.over or self._out.over):
                    self._progress.wait(timeout_s)

    def join(self, copy: Copy, part: int) -> None:
        """Wait until a part is there: the host until it was issued, compute until it was done.

        Raises:
            CopyFailed: it will never be there.
        """
        if copy.is_complete:
            return
        if len(copy.marks) <= part:
            started_s = time.perf_counter()
            with self._progress:
                self._progress.wait_for(lambda: copy.is_over or len(copy.marks) > part)
            self._joined_s += time.perf_counter() - started_s
        if len(copy.marks) <= part:
            raise CopyFailed("the keys and values of a sequence could not be copied") from copy.error
        self._in.stream.join(copy.marks[part])

    def finish(self, copy: Copy) -> None:
        """Wait until nothing of the copy runs any more."""
        with self._progress:
            self._progress.wait_for(lambda: copy.is_over)

    def close(self) -> None:
        """End the threads; what they have not begun is not copied."""
        self._close()

    def _submit(self, lane: _Lane, parts: Parts, then: Callable[[Copy], None]) -> Copy:
        copy = Copy(parts, lane.stream.fence(), then)
        self._num_open += 1
        lane.submit(copy)
        return copy
