"""Where copies run beside the compute, and how the two wait for each other, by device.

The engine's thread issues a copy after a `fence`: what compute wrote before it is what the copy
reads. The copy's thread works inside `scope` and `mark`s its progress; compute `join`s a mark
before it reads what was copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Mark = Any
"""A point in a stream: a CUDA event, or nothing where copies are done when their call returns."""


class CopyStream(Protocol):
    """One direction's copies."""

    def fence(self) -> Mark:
        """On the engine's thread: everything that compute was given so far."""

    def scope(self, fence: Mark) -> AbstractContextManager[Any]:
        """On the copy's thread: operators inside run on this stream, after the fence."""

    def mark(self) -> Mark:
        """On the copy's thread: everything that this stream was given so far."""

    def synchronize(self) -> None:
        """On the copy's thread: wait until this stream has done what it was given."""

    def join(self, mark: Mark) -> None:
        """On the engine's thread: let compute go on only after the mark. Does not block the host."""

    def waited_s(self) -> float:
        """Seconds that compute spent in `join` on the device since the last call."""


class HostCopyStream:
    """Host memory to host memory: the calls themselves copy, and release the interpreter's lock."""

    def fence(self) -> Mark:
        return None

    def scope(self, fence: Mark) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> Mark:
        return None

    def synchronize(self) -> None:
        return None

    def join(self, mark: Mark) -> None:
        return None

    def waited_s(self) -> float:
        return 0.0


class CudaCopyStream:
    """A CUDA stream of its own; copies to and from page-locked memory do not hold up the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def fence(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def scope(self, fence: Mark) -> AbstractContextManager[Any]:
        self._stream.wait_event(fence)
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()

    def join(self, mark: Mark) -> None:
        compute = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record(compute)
        compute.wait_event(mark)
        after.record(compute)
        self._waits.append((before, after))

    def waited_s(self) -> float:
        pending, total_ms = [], 0.0
        for before, after in self._waits:
            if after.query():  # type: ignore[no-untyped-call]
                total_ms += before.elapsed_time(after)
            else:
                pending.append((before, after))
        self._waits = pending
        return total_ms / 1e3


def stream_factory(device: torch.device) -> Callable[[], CopyStream]:
    """Makes the streams of a device."""
    if device.type == "cuda":
        return lambda: CudaCopyStream(device)
    return HostCopyStream
