"""The worker processes of this node: started here, or adopted from a placement that was killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from trireme.policies.placement import WorkerSnapshot
from trireme.policies.restarts import RestartHistory, after_death
from trireme.runtime import child_processes
from trireme.runtime.child_processes import ProcessIdentity
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord

log = logging.getLogger(__name__)

Slot = tuple[str, int]
"""A worker group and a number within it."""


@dataclass(slots=True)
class WorkerProcess:
    """One living worker process, and what was seen of it."""

    group: str
    index: int
    identity: ProcessIdentity
    started_s: float
    """When it was started or adopted, monotonic."""
    child: subprocess.Popen[bytes] | None
    """None where it was adopted: its parent is then the local supervisor."""
    record: ProcessRecord | None = None
    """As last seen in the registry."""
    lease_lost_at_s: float | None = None
    draining_at_s: float | None = None
    killed_because: str = ""
    loading: bool = False
    load_retry_at_s: float = 0.0
    load_error: str = ""

    @property
    def worker_id(self) -> str:
        return self.record.id if self.record is not None else ""

    @property
    def worker_address(self) -> str:
        """host:port of its gRPC server; empty until it registered."""
        return self.record.grpc_address if self.record is not None else ""

    @property
    def variants(self) -> list[str]:
        """What it serves or loads."""
        return [variant.variant for variant in self.record.worker.variants] if self.record else []

    @property
    def ready(self) -> bool:
        """Registered, in progress and taking requests."""
        record = self.record
        return (
            record is not None
            and self.lease_lost_at_s is None
            and record.healthy
            and not record.worker.draining
        )


@dataclass(slots=True)
class ProcessTable:
    """All worker processes of one fleet on one node."""

    command: Sequence[str]
    """Words that start a worker."""
    environ: Mapping[str, str]
    """Its environment, without group and index."""
    log_dir: Path
    threads: Mapping[str, int]
    """CPU threads by group."""
    living: list[WorkerProcess] = field(default_factory=list)
    histories: dict[Slot, RestartHistory] = field(default_factory=dict)
    last_exits: dict[Slot, str] = field(default_factory=dict)

    def start(self, group: str, index: int, *, now_s: float) -> WorkerProcess:
        """Start one worker.

        Raises:
            OSError: the command cannot be executed.
        """
        environ = {
            **self.environ,
            "TRIREME_WORKER_GROUP": group,
            "TRIREME_WORKER_INDEX": str(index),
            "OMP_NUM_THREADS": str(self.threads.get(group, 1)),
        }
        child = child_processes.start(self.command, environ=environ, log_path=self.log_path(group, index))
        identity = child_processes.identify(child.pid)
        if identity is None:  # it died at once; reap() will tell how
            identity = ProcessIdentity(child.pid, 0.0)
        process = WorkerProcess(group, index, identity, now_s, child)
        self.living.append(process)
        return process

    def could_not_start(self, group: str, index: int, why: str, *, now_s: float) -> None:
        """Count a start that failed like a death, so that it is tried again ever more slowly."""
        slot = (group, index)
        self.last_exits[slot] = f"could not start: {why}"
        self.histories[slot] = after_death(
            self.histories.get(slot, RestartHistory()), lived_s=0.0, now_s=now_s
        )

    def adopt(self, *, now_s: float) -> list[WorkerProcess]:
        """Take over the workers of this fleet and node that live and are not known here."""
        marks = ("TRIREME_WORKER_REDIS_URL", "TRIREME_WORKER_BUS_PREFIX", "TRIREME_WORKER_NODE")
        required = {name: self.environ[name] for name in marks}
        known = {process.identity.pid for process in self.living}
        words = list(self.command[1:])
        adopted = []
        for found in child_processes.with_environment(required):
            try:
                environ, arguments = found.environ(), found.cmdline()
            except psutil.Error:
                continue
            # What a worker runs itself (a compiler, say) inherits its environment.
            if found.pid in known or arguments[1:] != words:
                continue
            identity = child_processes.identify(found.pid)
            group, index = environ.get("TRIREME_WORKER_GROUP"), environ.get("TRIREME_WORKER_INDEX")
            if identity is None or group is None or index is None:
                continue
            adopted.append(WorkerProcess(group, int(index), identity, now_s, child=None))
        self.living += adopted
        return adopted

    def reap(self, *, now_s: float) -> list[tuple[WorkerProcess, str]]:
        """Forget the processes that ended; returns them with one phrase for how.

        A death that was not asked for counts in the slot's restart history.
        """
        ended = []
        for process in list(self.living):
            status: int | None = None
            if process.child is not None:
                status = process.child.poll()
                if status is None:
                    continue
            elif child_processes.is_alive(process.identity):
                continue
            how = child_processes.describe_exit(status)
            if process.killed_because:
                how = f"{how}: {process.killed_because}"
            self.living.remove(process)
            ended.append((process, how))
            slot = (process.group, process.index)
            self.last_exits[slot] = how
            if process.draining_at_s is None:
                self.histories[slot] = after_death(
                    self.histories.get(slot, RestartHistory()),
                    lived_s=now_s - process.started_s,
                    now_s=now_s,
                )
        return ended

    def see_records(self, records: Sequence[ProcessRecord], *, now_s: float) -> None:
        """Match the registry's living workers to the processes."""
        by_pid = {record.pid: record for record in records}
        for process in self.living:
            record = by_pid.get(process.identity.pid)
            if record is not None:
                process.record = record
                process.lease_lost_at_s = None
                if record.worker.draining and process.draining_at_s is None:
                    process.draining_at_s = now_s
            elif process.record is not None and process.lease_lost_at_s is None:
                process.lease_lost_at_s = now_s

    def registry_was_away(self, *, now_s: float) -> None:
        """No lease could be seen: nobody's time without one has begun, nor its time to register."""
        for process in self.living:
            process.lease_lost_at_s = None
            if process.record is None:
                process.started_s = now_s

    def snapshots(self, own_variants: Mapping[str, tuple[str, ...]], *, now_s: float) -> list[WorkerSnapshot]:
        """The living processes as the policy sees them; `own_variants` is by worker id."""

        def since(moment_s: float | None) -> float | None:
            return None if moment_s is None else now_s - moment_s

        return [
            WorkerSnapshot(
                pid=process.identity.pid,
                group=process.group,
                index=process.index,
                age_s=now_s - process.started_s,
                worker_id=process.worker_id,
                lease_lost_s=since(process.lease_lost_at_s),
                ready=process.ready,
                draining_s=since(process.draining_at_s),
                variants=frozenset(process.variants),
                own_variants=own_variants.get(process.worker_id),
                loading=process.loading or now_s < process.load_retry_at_s,
            )
            for process in self.living
        ]

    def waiting_s(self, *, now_s: float) -> dict[Slot, float]:
        """Seconds until a slot may be filled again."""
        return {slot: history.not_before_s - now_s for slot, history in self.histories.items()}

    def by_pid(self, pid: int) -> WorkerProcess:
        """The living process of that pid."""
        return next(process for process in self.living if process.identity.pid == pid)

    def by_worker_id(self, worker_id: str) -> WorkerProcess | None:
        """The living process of that registry id."""
        return next((process for process in self.living if process.worker_id == worker_id), None)

    def drain(self, process: WorkerProcess, *, now_s: float) -> None:
        """Ask a worker to finish its requests and exit."""
        process.draining_at_s = now_s
        child_processes.send_signal(process.identity, signal.SIGTERM)

    def kill(self, process: WorkerProcess, reason: str) -> None:
        """End a worker and all that it started, at once."""
        process.killed_because = reason
        if process.child is None and not child_processes.is_alive(process.identity):
            return
        try:
            os.killpg(process.identity.pid, signal.SIGKILL)
        except ProcessLookupError:
            log.info("killed_worker_was_gone", extra={"pid": process.identity.pid})

    def log_path(self, group: str, index: int) -> Path:
        """Where a worker logs."""
        return self.log_dir / f"{group}-{index}.log"

    def bound_logs(self) -> None:
        """Keep the workers' logs within their limit."""
        for process in self.living:
            child_processes.bound_log(self.log_path(process.group, process.index))
