"""Real service processes for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def service(
    name: str, log: Path, more_environ: Mapping[str, str] | None = None, /, **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m trireme.<name>` with TRIREME_<NAME>_* from `settings`; killed at the end."""
    prefix = f"TRIREME_{name.upper()}_"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRIREME_")}
    environ |= {prefix + key.upper(): str(value) for key, value in settings.items()}
    environ["PYTHONPATH"] = f"{REPOSITORY}/libs:{REPOSITORY}/services"
    environ.update(more_environ or {})
    environ["OMP_NUM_THREADS"] = "1"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"trireme.{name}"], env=environ, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], *, within_s: float = 60.0, what: str = "condition") -> None:
    """Return when `condition` holds.

    Raises:
        TimeoutError: it did not within `within_s`.
    """
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what} did not hold within {within_s} s")
        time.sleep(0.05)
