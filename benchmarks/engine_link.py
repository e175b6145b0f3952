"""How a step's news best gets from the engine's process to the worker's event loop.

    python -m benchmarks.engine_link [--steps 2000]

Encodings: `pickled`, the step as it is, by pickle's protocol 5; `columns`, the form of
`trireme.worker.step_news`, fixed numbers and one array. Transports: a socket pair read by an asyncio
protocol; a ring in shared memory with an eventfd to wake the reader. One writer process paces the
steps 2 ms apart, as a small model does; the reader runs uvloop. Latency is from before the writer encodes
to after the reader has decoded; CPU is that of the process per step.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import uvloop

from benchmarks.fleet import write_result
from trireme.load.report import percentile

PACE_S = 0.002
RING_BYTES = 1 << 20
_HEADER = struct.Struct("<I")
_TIME = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Output:
    """A token as the engine reports it."""

    sequence_id: str
    index: int
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step as the engine reports it."""

    variant: str
    seconds: float
    outputs: tuple[Output, ...]
    work: tuple[tuple[str, int, int, float], ...]
    stats: tuple[float, ...]


def encode_pickled(sequences: int, index: int) -> bytes:
    names = [f"req-0123456789abcdef01234567#0@{n}" for n in range(sequences)]
    step = Step(
        "variant",
        0.002,
        tuple([Output(name, index, 17) for name in names]),
        tuple([(name, 0, 1, 0.002 / sequences) for name in names]),
        (1.0,) * 16,
    )
    return pickle.dumps(step, protocol=5)


def encode_columns(sequences: int, index: int) -> bytes:
    rows = array("q")
    for number in range(sequences):
        rows.extend((number, index, 17))
    return struct.pack("<HHId16d", 0, 0, sequences, 0.002, *(1.0,) * 16) + rows.tobytes()


def decode_pickled(payload: bytes) -> int:
    step = pickle.loads(payload)
    taken = 0
    for output in step.outputs:
        taken += output.token_id
    return taken


def decode_columns(payload: bytes) -> int:
    struct.unpack_from("<HHId16d", payload)
    rows = array("q")
    rows.frombytes(memoryview(payload)[struct.calcsize("<HHId16d") :])
    values = iter(rows)
    taken = 0
    for _, _, token in zip(values, values, values):  # noqa: B905
        taken += token
    return taken


ENCODINGS: dict[str, tuple[Callable[[int, int], bytes], Callable[[bytes], int]]] = {
    "pickled": (encode_pickled, decode_pickled),
    "columns": (encode_columns, decode_columns),
}


def write(transport: str, encoding: str, sequences: int, steps: int, fds: list[int]) -> None:
    """The engine's side: prints its CPU microseconds per step."""
    encode = ENCODINGS[encoding][0]
    link = socket.socket(fileno=fds[0]) if transport == "socket" else None
    ring = None if link is not None else mmap.mmap(fds[0], RING_BYTES)
    cpu_s = 0.0
    at = 0
    for index in range(steps):
        time.sleep(PACE_S)
        cpu_before_s = time.thread_time()
        started_s = time.monotonic()
        payload = _TIME.pack(started_s) + encode(sequences, index)
        if link is not None:
            link.sendall(_HEADER.pack(len(payload)) + payload)
        else:
            assert ring is not None
            if at + 4 + len(payload) > RING_BYTES:
                at = 0
            ring[at + 4 : at + 4 + len(payload)] = payload
            ring[at : at + 4] = _HEADER.pack(len(payload))
            at += 4 + len(payload)
            os.eventfd_write(fds[1], 1)
        cpu_s += time.thread_time() - cpu_before_s
    print(1e6 * cpu_s / steps, flush=True)
    time.sleep(0.2)


class FrameReader(asyncio.Protocol):
    """Cuts the socket's bytes into frames."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 4:
            end = 4 + _HEADER.unpack_from(buffer)[0]
            if len(buffer) < end:
                return
            self._take(bytes(buffer[4:end]))
            del buffer[:end]


async def read(transport: str, encoding: str, sequences: int, steps: int) -> dict[str, float]:
    """The worker's side, which starts the other."""
    decode = ENCODINGS[encoding][1]
    latencies_us: list[float] = []
    done = asyncio.Event()

    def take(payload: bytes) -> None:
        decode(payload[8:])
        latencies_us.append(1e6 * (time.monotonic() - _TIME.unpack_from(payload)[0]))
        if len(latencies_us) == steps:
            done.set()

    loop = asyncio.get_running_loop()
    if transport == "socket":
        near, far = socket.socketpair()
        await loop.create_connection(lambda: FrameReader(take), sock=near)
        fds = [far.fileno()]
    else:
        memory_fd, wake_fd = os.memfd_create("ring"), os.eventfd(0, os.EFD_NONBLOCK)
        os.ftruncate(memory_fd, RING_BYTES)
        ring = mmap.mmap(memory_fd, RING_BYTES)
        at = 0

        def look() -> None:
            nonlocal at
            for _ in range(os.eventfd_read(wake_fd)):
                size = _HEADER.unpack_from(ring, at)[0] if at + 4 <= RING_BYTES else 0
                if size == 0 or at + 4 + size > RING_BYTES:
                    at = 0
                    size = _HEADER.unpack_from(ring, at)[0]
                take(ring[at + 4 : at + 4 + size])
                at += 4 + size

        loop.add_reader(wake_fd, look)
        fds = [memory_fd, wake_fd]
    words = [sys.executable, "-m", "benchmarks.engine_link", "--write", transport, encoding]
    words += [str(sequences), str(steps), *map(str, fds)]
    writer = await asyncio.create_subprocess_exec(*words, pass_fds=fds, stdout=subprocess.PIPE)
    cpu_before_s = time.process_time()
    await done.wait()
    cpu_us = 1e6 * (time.process_time() - cpu_before_s) / steps
    out, _ = await writer.communicate()
    ordered = sorted(latencies_us)
    return {
        "latency_us_p50": round(percentile(ordered, 0.5), 1),
        "latency_us_p99": round(percentile(ordered, 0.99), 1),
        "writer_cpu_us": round(float(out), 1),
        "reader_cpu_us": round(cpu_us, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        transport, encoding, sequences, steps, *fds = sys.argv[2:]
        write(transport, encoding, int(sequences), int(steps), [int(fd) for fd in fds])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    for sequences in (1, 64):
        for transport in ("socket", "ring"):
            for encoding in ENCODINGS:
                figures[f"{transport}_{encoding}_{sequences}"] = uvloop.run(
                    read(transport, encoding, sequences, arguments.steps)
                )
    print(write_result("engine_link", figures).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
