"""Settings of the placement service: TRIREME_PLACEMENT_<FIELD>."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Read once at start."""

    redis_url: str
    fleet: Path
    """fleet.yaml: the desired fleet."""
    bus_prefix: str = "trireme"
    node: str = "local"
    """Workers are started on this node and carry its name."""
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    advertise: str | None = None
    """host:port others reach the gRPC server at; absent: what it is bound to."""
    run_dir: Path = Path(".run")
    """Worker logs go to `logs/` below it."""
    run_id: str = ""
    """Names one `trireme up`: what `scale` changed holds until its end."""
    backend: str = "processes"
    """Where the workers run: `processes` of this node, or workloads of a `kubernetes` cluster."""
    supervise: bool = True
    """Processes only: False where someone else starts the workers."""
    kubeconfig: Path | None = None
    """The cluster to scale in; absent: the one that this pod runs in."""
    namespace: str = ""
    """Of the workloads; empty: this pod's own."""
    release_selector: str = ""
    """Labels of all that is this fleet's, `app.kubernetes.io/instance=blue`; required with kubernetes."""
    take_replicas_from: tuple[str, ...] = ("helm",)
    """Field managers that give up the number of replicas: who made the workload, and no autoscaler."""
    lease: str = "trireme-placement"
    """The Lease whose holder alone scales."""
    lease_s: int = 15
    """A holder that is gone is replaced after so long."""
    watch_s: int = 20
    """Watches are opened anew so often, which shows that the API still answers."""
    stale_s: float = 45.0
    """What is older decides nothing."""
    worker_command: str = ""
    """Shell words that start a worker; empty: this Python with `-m trireme.worker`."""
    period_s: float = 0.25
    """Between two looks at the fleet."""
    surge: int = 1
    lease_grace_s: float = 5.0
    start_timeout_s: float = 180.0
    drain_timeout_s: float = 35.0
    """Longer than a worker gives its requests on SIGTERM."""
    load_retry_s: float = 10.0
    """After a load that failed."""
    log_level: str = "info"

    @property
    def worker_words(self) -> list[str]:
        """The command that starts a worker."""
        return shlex.split(self.worker_command) or [sys.executable, "-m", "trireme.worker"]
