"""Bytes on sockets that no client library would send: HTTP/1.1, HTTP/2 and gRPC frames, torn and vast."""

from __future__ import annotations

import random
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.hostile.verdicts import Verdicts

ANSWER_S = 2.0
SILENCE_S = 0.1
"""A server that says nothing for so long has said all, or waits for the rest of a request."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
_GRPC_FAULT = re.compile(rb"grpc-status.(?:2|13|14|15|10)(?![0-9])", re.S)
_TRANSPORTS_OWN = re.compile(
    rb"grpc-message.{1,3}?(?:Failed parsing HTTP/2|Compression bit set|Error parsing 'grpc-)", re.S
)
"""What the gRPC library's transport says of bytes that are no HTTP/2, with the statuses that its standard
has for that; no call came of them."""


def frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """One HTTP/2 frame; `length` says another length than it has."""
    said = len(payload) if length is None else length
    return struct.pack(">I", said)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header_block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """HPACK literals without indexing."""
    block = b""
    for name, value in pairs:
        block += b"\x00" + _integer(len(name)) + name + _integer(len(value)) + value
    return block


def _integer(number: int) -> bytes:
    """As HPACK writes a length of 7 bits, or more."""
    if number < 127:
        return bytes([number])
    rest, out = number - 127, b"\x7f"
    while rest >= 128:
        out += bytes([rest % 128 + 128])
        rest //= 128
    return out + bytes([rest])


def call_headers(path: str, **changes: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of a gRPC call."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path.encode(),
        b":authority": b"h",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    headers |= {name.replace("_", "-").encode(): value for name, value in changes.items()}
    return list(headers.items())


def grpc_connections(path: str, rng: random.Random, count: int) -> Iterator[bytes]:
    """What to send to a gRPC port: some written by hand, the others drawn."""
    opening = PREFACE + frame(SETTINGS, 0, 0, b"")
    head = frame(HEADERS, END_HEADERS, 1, header_block(call_headers(path)))
    message = b"\x00" + struct.pack(">I", 6) + b"\x0a\x04none"
    no_text = header_block([*call_headers(path)[:2], (b":path", b"/\xff/\xaf"), *call_headers(path)[3:]])
    written = [
        opening + head + frame(DATA, END_STREAM, 1, message[:3]),
        opening + head + frame(DATA, END_STREAM, 1, message[:7]),
        opening + head + frame(DATA, 0, 1, message[:7]),
        opening + head + frame(DATA, END_STREAM, 1, b""),
        opening + head + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", 2**31) + b"x"),
        opening + head + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", 2**32 - 1)),
        opening + head + frame(DATA, END_STREAM, 1, b"\x01" + message[1:]),
        opening + head + frame(DATA, END_STREAM, 1, b"\xff" + message[1:]),
        opening + head + frame(DATA, END_STREAM, 1, message + message),
        opening + head + frame(DATA, 0, 1, message, length=2**24 - 1),
        opening + head + frame(RST_STREAM, 0, 1, struct.pack(">I", 8)) * 100,
        opening + frame(PING, 0, 0, b"12345678") * 1000,
        opening + frame(SETTINGS, 0, 0, b"\x00\x04\xff\xff\xff\xff" * 100),
        opening + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3,
        opening + frame(GOAWAY, 0, 0, b"\0" * 8) + head,
        opening + frame(CONTINUATION, 0, 1, b"\0" * 100) * 100,
        opening + frame(HEADERS, 0, 1, header_block(call_headers(path))) + frame(PING, 0, 0, b"\0" * 8),
        opening + frame(HEADERS, END_HEADERS, 1, b"\xff" * 60),
        opening + frame(HEADERS, END_HEADERS, 1, no_text),
        opening + frame(HEADERS, END_HEADERS, 2, header_block(call_headers(path))),
        opening + frame(HEADERS, END_HEADERS, 1, header_block(call_headers(path, content_type=b"text/html"))),
        opening + frame(HEADERS, END_HEADERS, 1, header_block(call_headers(path, grpc_encoding=b"zz"))),
        opening + frame(HEADERS, END_HEADERS, 1, header_block(call_headers(path, grpc_timeout=b"-9q"))),
        opening + frame(HEADERS, END_HEADERS, 1, header_block([(b"x" * 50, b"y" * 900)] * 16)),
        opening + b"".join(
            frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, header_block(call_headers(path)))
            + frame(RST_STREAM, 0, 2 * n + 1, struct.pack(">I", 8))
            for n in range(200)
        ),
        b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"",
    ]  # fmt: skip
    yield from written[:count]
    for _ in range(count - len(written)):
        base = bytearray(rng.choice(written[:9]))
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(PREFACE), len(base)) if rng.random() < 0.9 else 0
            base[position : position + rng.randint(0, 6)] = rng.randbytes(rng.randint(0, 6))
        yield bytes(base)


def http_connections(rng: random.Random, count: int) -> Iterator[bytes]:
    """What to send to an HTTP port."""
    post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\n"
    written = [
        b"GET /v1/models HTTP/1.1\r\nhost: h\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: h\r\n\r\n",
        post + b"content-length: -1\r\n\r\n",
        post + b"content-length: 99999999999999999999\r\n\r\n{}",
        post + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        post + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        post + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
        post + b"transfer-encoding: chunked\r\n\r\n2;" + b"e" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
        post + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        post + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
        post + b"content-length: 100\r\n\r\n{",
        post + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n[]",
        post + b"content-length: 20000\r\n\r\n" + b"[" * 20_000,
        post + b"x-request-id: \xff\x00\r\ncontent-length: 2\r\n\r\n{}",
        b"GET /v1/models/%00%ff%2e%2e%2f HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET http://other/v1/models HTTP/1.1\r\nhost: h\r\n\r\n",
        b"CONNECT h:1 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\nhost: h\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: h\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"\x00" * 100,
        PREFACE,
        b"\r\n" * 1000,
        b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n" * 50,
    ]
    yield from written[:count]
    chat = b'{"model": "none", "messages": [{"role": "user", "content": "hi"}]}'
    for _ in range(count - len(written)):
        base = bytearray(post + b"content-length: %d\r\n\r\n" % len(chat) + chat)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(base))
            base[position : position + rng.randint(0, 6)] = rng.randbytes(rng.randint(0, 6))
        yield bytes(base)


def send_all(address: str, sent: Iterator[bytes], verdicts: Verdicts, *, kind: str) -> None:
    """Each on a connection of its own; the answer must be no 5xx and no gRPC status of a server's fault."""
    for payload in sent:
        answer = exchange(address, payload)
        if kind.startswith("http"):
            statuses = [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
            bad = any(status >= 500 for status in statuses)
            outcome = str(statuses[0]) if statuses else "closed"
        else:
            no_http2 = _TRANSPORTS_OWN.search(answer) is not None
            bad = _GRPC_FAULT.search(answer) is not None and not no_http2
            status = re.search(rb"grpc-status.(\d+)", answer, re.S)
            outcome = f"status {int(status[1])}" if status else ("frames" if answer else "closed")
            outcome = "no HTTP/2" if no_http2 else outcome
        verdicts.note(kind, outcome, fault=f"{payload[-120:]!r} -> {answer[-200:]!r}" if bad else "")


def exchange(address: str, payload: bytes) -> bytes:
    """Send, and read until the server closes or is silent for a while."""
    host, _, port = address.rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=ANSWER_S) as connection:
        try:
            connection.sendall(payload)
            connection.settimeout(SILENCE_S)
            while len(answer) < 2**20 and (part := connection.recv(65536)):
                answer += part
        except (ConnectionError, TimeoutError):
            pass
    return answer


@contextmanager
def slow_connections(addresses: list[str], count: int) -> Iterator[None]:
    """While the block runs, `count` connections to each address have begun a request and do not go on."""
    beginning = {True: b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-slow", False: PREFACE[:20]}
    with ExitStack() as stack:
        for number, address in enumerate(addresses * count):
            host, _, port = address.rpartition(":")
            connection = socket.create_connection((host, int(port)), timeout=ANSWER_S)
            stack.enter_context(connection).sendall(beginning[number % 2 == 0])
        yield
