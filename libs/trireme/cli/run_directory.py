"""The run directory: one fleet's logs, data and state file on this machine.

Whatever belongs to the fleet has the directory's path in its environment, so that `down`
finds it even where every supervisor of it was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trireme.errors import InvalidConfiguration, ServiceUnavailable
from trireme.runtime.child_processes import ProcessIdentity, is_alive, with_environment

MARK = "TRIREME_RUN_DIR"
"""Environment variable of all processes of the fleet."""
DEFAULT = Path(".run")


class AlreadyRunning(InvalidConfiguration):
    """Another supervisor holds this run directory, or left processes behind."""


@dataclass(frozen=True, slots=True)
class SupervisedProcess:
    """One service process, as the state file tells it."""

    name: str
    service: str
    pid: int
    """0: none now."""
    started_unix_s: float
    restarts: int = 0
    last_exit: str = ""
    """One phrase; empty: it never ended."""
    crash_looping: bool = False

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.started_unix_s)


@dataclass(frozen=True, slots=True)
class Phase:
    """One step of the start."""

    name: str
    seconds: float
    """Since the supervisor began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetState:
    """What `fleet.json` holds."""

    phase: str
    """starting, ready, stopping, stopped or failed."""
    run_id: str
    fleet: str
    """Path of the fleet file."""
    node: str
    bus_prefix: str
    redis_url: str
    http: list[str] = field(default_factory=list)
    """host:port of each gateway replica's HTTP server."""
    grpc: list[str] = field(default_factory=list)
    """host:port of each gateway replica's gRPC server."""
    operator: str = ""
    """host:port of the page for operators; empty: there is none."""
    tls: str = ""
    """Directory of the fleet's certificates; empty: plaintext."""
    supervisor_pid: int = 0
    supervisor_started_unix_s: float = 0.0
    processes: list[SupervisedProcess] = field(default_factory=list)
    timeline: list[Phase] = field(default_factory=list)
    waiting_for: str = ""
    """While starting: what is not there yet."""
    error: str = ""
    """Where it failed: one sentence."""

    @property
    def http_scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def supervisor(self) -> ProcessIdentity:
        return ProcessIdentity(self.supervisor_pid, self.supervisor_started_unix_s)

    @property
    def supervisor_lives(self) -> bool:
        return self.supervisor_pid > 0 and is_alive(self.supervisor)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths below one run directory; `path` is absolute."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> RunDirectory:
        return cls(path.resolve())

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def state_file(self) -> Path:
        return self.path / "fleet.json"

    @property
    def redis_data(self) -> Path:
        return self.path / "redis"

    def log_of(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def create(self) -> None:
        """Make the directory, readable by its owner only: it holds the bus's password and KV blocks.

        Raises:
            InvalidConfiguration: it cannot be made.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            os.chmod(self.path, 0o700)
        except OSError as error:
            message = f"cannot use {self.path} as run directory: {error.strerror}; choose one with --run-dir"
            raise InvalidConfiguration(message, param="run_dir") from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory while the block runs.

        Raises:
            AlreadyRunning: another supervisor holds it.
        """
        with (self.path / "supervisor.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(
                    f"a fleet runs already in {self.path}: stop it with `trireme down`, "
                    "or choose another directory with --run-dir"
                ) from None
            yield

    def write(self, state: FleetState) -> None:
        """Replace the state file in one step."""
        draft = self.state_file.with_suffix(".json.new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(asdict(state), out, indent=1)
        draft.replace(self.state_file)

    def read(self) -> FleetState | None:
        """The state file; None where no fleet ever ran here.

        Raises:
            InvalidConfiguration: the file is not one of ours.
        """
        try:
            body = json.loads(self.state_file.read_text(encoding="utf-8"))
            body["processes"] = [SupervisedProcess(**entry) for entry in body["processes"]]
            body["timeline"] = [Phase(**entry) for entry in body["timeline"]]
            return FleetState(**body)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidConfiguration(
                f"{self.state_file} is not a fleet's state file ({error}): run `trireme down`"
            ) from error

    def running(self) -> FleetState:
        """The state of the fleet that runs here.

        Raises:
            ServiceUnavailable: none runs.
        """
        state = self.read()
        if state is None or not state.supervisor_lives:
            raise ServiceUnavailable(f"no fleet runs in {self.path}: start one with `trireme up`")
        return state

    def processes(self) -> list[ProcessIdentity]:
        """All living processes of the fleet, but not the caller: those marked, and those on record."""
        found = {
            process.pid: ProcessIdentity(process.pid, process.create_time())
            for process in with_environment({MARK: str(self.path)})
        }
        state = self.read()
        for process in state.processes if state is not None else ():
            if process.pid > 0 and is_alive(process.identity):
                found[process.pid] = process.identity
        found.pop(os.getpid(), None)
        return list(found.values())
