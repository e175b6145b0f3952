"""What a look at a fleet found, as plain data: rules judge it, the bundle holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of a process's /metrics."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """One process: supervised here, known to the registry, or both."""

    name: str
    service: str
    node: str = ""
    pid: int = 0
    """0: none now."""
    supervised: bool = False
    """The supervisor of this machine's fleet keeps it running."""
    registered: bool = False
    """Its lease holds."""
    healthy: bool = False
    """As it says itself in the registry."""
    status: str = ""
    health: str = ""
    """What its gRPC health says, or why it did not answer; empty: it was not asked."""
    version: str = ""
    grpc_address: str = ""
    http_address: str = ""
    started_unix_s: float = 0.0
    restarts: int = 0
    last_exit: str = ""
    crash_looping: bool = False
    draining: bool = False
    ready_variants: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """TRIREME_* and OTEL_* variables, secrets left out; of processes of this machine."""
    samples: tuple[Sample, ...] = ()
    """Those that rules look at."""
    metrics_error: str = ""

    @property
    def lives(self) -> bool:
        return self.registered or self.pid > 0

    def values(self, name: str) -> list[float]:
        """The metric's values, over all its labels."""
        return [sample.value for sample in self.samples if sample.name == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFacts:
    """One stream of the bus."""

    name: str
    length: int
    lag: int = 0
    """Entries that no reader of the group had yet."""
    pending: int = 0
    """Entries that were read and not acknowledged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """The bus."""

    answers: bool
    error: str = ""
    """Why it does not answer."""
    write_error: str = ""
    """What it said to a write; empty: it took it."""
    info: Mapping[str, str] = field(default_factory=dict)
    clock_ahead_s: float = 0.0
    """Of this machine's clock."""
    streams: tuple[StreamFacts, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """One worker group, as placement has it."""

    name: str
    desired: int
    ready: int
    variants: tuple[str, ...] = ()
    """Wanted on each worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """One place for a worker, as placement has it."""

    name: str
    phase: str
    restarts: int = 0
    last_exit: str = ""
    crash_looping: bool = False
    load_error: str = ""
    """Of the last load that failed; it may be history."""
    worker_id: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementFacts:
    """What placement said."""

    answers: bool
    groups: tuple[GroupFacts, ...] = ()
    workers: tuple[WorkerPlace, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """A file system that the fleet writes to."""

    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogError:
    """The last error that a process logged."""

    process: str
    event: str
    detail: str
    """The exception's last line, or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """All of it."""

    taken_unix_s: float
    run_dir: str
    fleet_file: str
    phase: str
    """Of the supervisor; `none` where none ever ran here, `unsupervised` where only the bus was named."""
    supervisor_lives: bool
    startup_error: str
    waiting_for: str
    redis: RedisFacts
    placement: PlacementFacts
    processes: tuple[ProcessFacts, ...] = ()
    disks: tuple[DiskFacts, ...] = ()
    log_errors: tuple[LogError, ...] = ()
    version: str = ""
    """Of the code that looks."""
    cpu_kernels: bool | None = None
    """Whether the CPU kernels' library is built; None: no worker here computes on CPUs."""

    def of(self, service: str) -> list[ProcessFacts]:
        """The processes of a service."""
        return [process for process in self.processes if process.service == service]
