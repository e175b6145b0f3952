"""Settings of the power service, from TRIREME_POWER_*."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Read once at start."""

    redis_url: str
    bus_prefix: str = "trireme"
    node: str = "local"
    """The node whose meters these are; one power service per node."""
    fleet: Path | None = None
    """fleet.yaml: its `power` section and the devices of its workers; absent: the CPU, a static signal."""
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    advertise: str | None = None
    """host:port others reach the gRPC server at; absent: what it is bound to."""
    window_s: float = 1.0
    """Between two readings of the meters, and between two tariffs."""
    finished_requests: int = 10_000
    """Newest finished requests whose energy can be asked for."""
    cpu_idle_w: float | None = None
    """Measured idle draw of this machine's CPU, for the CPU model; absent: from its table."""
    cpu_max_w: float | None = None
    """Measured full draw of this machine's CPU, for the CPU model; absent: from its table."""
    cpu_alpha: float = 1.0
    """Exponent of utilisation in the CPU model; 1 keeps its energy additive."""
    carbon_refresh_s: float = 300.0
    """Between two questions to an HTTP carbon source."""
    carbon_max_age_s: float = 7200.0
    """An HTTP value older than this gives way to the static one."""
    modelled_gpu_w: tuple[str, ...] = ()
    """Idle watts of modelled GPUs cuda:0, cuda:1, ... for trying things without a GPU."""
    log_level: str = "info"
