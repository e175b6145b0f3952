"""Settings of a worker, from TRIREME_WORKER_*. What it serves it reads from the fleet's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    redis_url: str
    fleet: Path
    """The fleet's file."""
    bus_prefix: str = "trireme"
    node: str = "local"
    """The node whose KV store it shares memory with."""
    meter_node: str = ""
    """The node whose power service meters it, where one node's meters serve several stores; empty: `node`."""
    group: str = "worker"
    """The worker group in the fleet's file that says what to serve."""
    index: int = 0
    """Which replica of the group this is."""
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    stall_s: float = 5.0
    """An engine step longer than this is a stall: the lease is not renewed any more."""
    drain_s: float = 30.0
    """On SIGTERM, requests have so long to end here; then they go on elsewhere."""
    orphan_s: float = 60.0
    """Output that no gateway asks for is kept so long."""
    store_deadline_s: float = 0.25
    """Time for the KV store to answer before a block counts as missing."""
    kv_load_always: bool = False
    """Load stored KV wherever there is any, not only where that is faster than computing it."""
    vllm_aliases: bool = True
    """Tell Prometheus the main figures under vLLM's names too."""
    log_level: str = "info"
