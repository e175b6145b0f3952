"""Frames on the socket between a worker and its engine process: length, kind, payload."""

from __future__ import annotations

import enum
import pickle
import struct
from collections.abc import Iterator

_HEADER = struct.Struct("<IB")


class FrameKind(enum.IntEnum):
    """What a frame holds."""

    BEAT = 0
    """Nothing: the sender is alive."""
    NEWS = 1
    """A step's news, packed by `step_news`."""
    MESSAGE = 2
    """A pickled message of `engine_messages`."""


def frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEADER.pack(len(payload), kind) + payload


def message(message: object) -> bytes:
    """A message's frame."""
    return frame(FrameKind.MESSAGE, pickle.dumps(message, protocol=5))


def opened(payload: bytes) -> object:
    """The message of a frame's payload."""
    return pickle.loads(payload)


class FrameCutter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(kind, payload) of each frame that `data` completes."""
        if self._left:
            data = self._left + data
            self._left = b""
        start, end = 0, len(data)
        while end - start >= _HEADER.size:
            size, kind = _HEADER.unpack_from(data, start)
            stop = start + _HEADER.size + size
            if stop > end:
                break
            yield kind, data[start + _HEADER.size : stop]
            start = stop
        # A large frame comes in pieces; copying what is left again for each of them is a matter of
        # milliseconds at the size of the largest request.
        self._left = data[start:]
