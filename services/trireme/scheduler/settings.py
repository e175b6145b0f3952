"""Settings of the scheduler, from TRIREME_SCHEDULER_*."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    redis_url: str
    bus_prefix: str = "trireme"
    node: str = "local"
    fleet: str = "trireme"
    """The fleet's name, or the path of its file; only the registry shows it."""
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    window_requests: int = 16384
    """Requests held in memory for ordering; what is beyond waits in the stream, in order."""
    queue_limit: int = 4
    """Requests a worker may hold beyond its batch, where it does not tell."""
    log_level: str = "info"
