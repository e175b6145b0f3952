"""Processes that a supervisor starts: who they are, where they log, how they ended.

A pid alone may be reused; a pid with its start time is one process for ever.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

LOG_LIMIT_BYTES = 16 * 2**20
"""A log that grew beyond this is moved to `<name>.log.1`, which it replaces."""

_START_TOLERANCE_S = 1.5
"""The kernel reports starts in ticks since boot, and the boot time itself wanders a little."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process for ever."""

    pid: int
    started_unix_s: float


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a living process; None where it is gone or only waits to be reaped."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return ProcessIdentity(pid, process.create_time())
    except psutil.Error:
        return None


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether that very process lives; a zombie is dead."""
    found = identify(identity.pid)
    return found is not None and abs(found.started_unix_s - identity.started_unix_s) < _START_TOLERANCE_S


def send_signal(identity: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal that very process; False where it is gone."""
    if not is_alive(identity):
        return False
    try:
        os.kill(identity.pid, number)
    except ProcessLookupError:
        return False
    return True


def start(command: Sequence[str], *, environ: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a child that logs to `log_path`, in its own session so that a terminal's Ctrl-C misses it.

    Raises:
        OSError: the program cannot be executed.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # Append mode: the child goes on at the new end after the log was moved away.
    with log_path.open("ab") as log_file:
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def describe_exit(returncode: int | None) -> str:
    """One phrase for an exit status; None where another process reaped it."""
    if returncode is None:
        return "ended (status unknown)"
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit status {returncode}"


def bound_log(path: Path, *, limit_bytes: int = LOG_LIMIT_BYTES) -> bool:
    """Move a log that is too long to `<name>.1` under its writer's hands; True where it did.

    Where there is no room for the copy, the log is emptied without one.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    try:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
    except OSError as error:
        log.warning("log_not_kept", extra={"path": str(path), "error": error.strerror})
    os.truncate(path, 0)
    return True


def last_lines(path: Path, *, count: int = 5) -> list[str]:
    """The last lines of a log; none where there is no log."""
    try:
        with path.open("rb") as log_file:
            log_file.seek(max(0, path.stat().st_size - 16 * 1024))
            text = log_file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


def with_environment(required: Mapping[str, str]) -> Iterator[psutil.Process]:
    """Living processes of this user whose environment has all of `required`."""
    own_uid = os.getuid()
    for process in psutil.process_iter():
        try:
            if process.uids().real != own_uid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environ = process.environ()
        except (psutil.Error, OSError):
            continue
        if all(environ.get(name) == value for name, value in required.items()):
            yield process
