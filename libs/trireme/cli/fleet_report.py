"""One look at a running fleet, gathered from the state file, the registry, the bus and gRPC health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from trireme.bus.connection import AWAY, Keys, redis_options
from trireme.cli.placement_client import placement_state
from trireme.cli.readiness import healths_of, look
from trireme.cli.run_directory import FleetState, RunDirectory
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord, VariantStatus
from trireme.wire.placement.v1 import placement_pb2 as placement_pb


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceReport:
    """One service process."""

    name: str
    service: str
    pid: int
    grpc_address: str
    http_address: str
    health: str
    """SERVING, NOT_SERVING, or why it did not answer; `down` where no process lives."""
    restarts: int
    last_exit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantReport:
    """One variant at one worker."""

    variant: str
    ready: bool
    waiting: int
    running: int
    kv_usage: float
    """Share of KV blocks in use, 0..1."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    """Of one sequence."""
    decode_tokens_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """One worker process."""

    name: str
    worker_id: str
    pid: int
    phase: str
    device: str
    grpc_address: str
    http_address: str
    """Of its metrics."""
    restarts: int
    last_exit: str
    assigned_requests: int
    """On the bus for it and not ended."""
    assigned_tokens: int
    variants: list[VariantReport] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """One worker group, as wished and as it is."""

    group: str
    desired: int
    ready: int
    variants: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """All of it."""

    phase: str
    run_dir: str
    fleet: str
    http: list[str]
    http_scheme: str
    """http, or https where the fleet has certificates."""
    grpc: list[str]
    bus: str
    """answers, or away."""
    waiting_requests: int
    """Admitted, and with no worker yet."""
    services: list[ServiceReport]
    groups: list[GroupReport]
    workers: list[WorkerReport]
    recent: list[str]
    """Placement's last steps, newest first."""


@asynccontextmanager
async def bus_of(state: FleetState) -> AsyncIterator[Redis]:
    """A client of the fleet's bus that gives up at once where it is away."""
    url, credentials = redis_options(state.redis_url)
    redis = Redis.from_url(
        url, **credentials, socket_connect_timeout=1.0, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)
    )
    try:
        yield redis
    finally:
        await redis.aclose()


async def living_processes(state: FleetState) -> list[ProcessRecord]:
    """The registry's living processes; none while the bus is away."""
    async with bus_of(state) as redis:
        return (await look(redis, Keys(state.bus_prefix))).records


async def report(state: FleetState, run_directory: RunDirectory) -> FleetReport:
    """Look once. What does not answer is told as such; nothing is raised for it."""
    keys = Keys(state.bus_prefix)
    async with bus_of(state) as redis:
        sighting = await look(redis, keys)
        records = sighting.records
        workers = [record for record in records if record.service == "worker"]
        try:
            waiting = int(await redis.xlen(keys.requests))
            loads = [await _load(redis, keys.load(worker.id)) for worker in workers]
        except AWAY:
            waiting, loads = 0, [(0, 0) for _ in workers]
    asked = placement_state(records)
    placement, services = await asyncio.gather(asked, _services(state, records))
    groups, recent = [], []
    if placement is not None:
        recent = list(placement.recent)
        groups = [
            GroupReport(
                group=group.group,
                desired=group.desired_replicas,
                ready=group.ready_replicas,
                variants=list(group.desired_variants),
            )
            for group in placement.groups
        ]
    return FleetReport(
        phase=state.phase,
        run_dir=str(run_directory.path),
        fleet=state.fleet,
        http=state.http,
        http_scheme=state.http_scheme,
        grpc=state.grpc,
        bus="answers" if sighting.redis_answers else "away",
        waiting_requests=waiting,
        services=services,
        groups=groups,
        workers=_workers(workers, loads, placement),
        recent=recent,
    )


async def _load(redis: Redis, key: str) -> tuple[int, int]:
    row = await cast("Awaitable[list[bytes | None]]", redis.hmget(key, ["requests", "tokens"]))
    return int(row[0] or 0), int(row[1] or 0)


async def _services(state: FleetState, records: list[ProcessRecord]) -> list[ServiceReport]:
    by_pid = {record.pid: record for record in records}
    found = [by_pid.get(process.pid) for process in state.processes]
    healths = await healths_of(found)
    services = []
    for process, record, health in zip(state.processes, found, healths, strict=True):
        if process.pid == 0:
            health = "crash loop" if process.crash_looping else "down"
        elif process.service == "redis":
            health = "up"
        services.append(
            ServiceReport(
                name=process.name,
                service=process.service,
                pid=process.pid,
                grpc_address=record.grpc_address if record is not None else "",
                http_address=record.http_address if record is not None else "",
                health=health or "no lease",
                restarts=process.restarts,
                last_exit=process.last_exit,
            )
        )
    return services


def _workers(
    records: list[ProcessRecord],
    loads: list[tuple[int, int]],
    placement: placement_pb.GetStateResponse | None,
) -> list[WorkerReport]:
    by_id = {record.id: (record, load) for record, load in zip(records, loads, strict=True)}
    known = list(placement.workers) if placement is not None else []
    told = {worker.worker_id for worker in known}
    # Where placement is away, the registry still knows them.
    known += [
        placement_pb.WorkerProcess(worker_id=record.id, pid=record.pid, phase=placement_pb.WORKER_PHASE_READY)
        for record in records
        if record.id not in told
    ]
    reports = []
    for worker in known:
        record, load = by_id.get(worker.worker_id, (ProcessRecord(), (0, 0)))
        phase = placement_pb.WorkerPhase.Name(worker.phase).removeprefix("WORKER_PHASE_").lower()
        if worker.phase == placement_pb.WORKER_PHASE_WAITING:
            phase = f"restarts in {worker.restart_in_s:.0f} s"
        if worker.crash_looping:
            phase += " (crash loop)"
        reports.append(
            WorkerReport(
                name=f"{worker.group}-{worker.index}" if worker.group else worker.worker_id,
                worker_id=worker.worker_id,
                pid=worker.pid,
                phase=phase,
                device=record.worker.device,
                grpc_address=record.grpc_address,
                http_address=record.http_address,
                restarts=worker.restarts,
                last_exit=worker.last_exit,
                assigned_requests=load[0],
                assigned_tokens=load[1],
                variants=[_variant(variant) for variant in record.worker.variants],
            )
        )
    return reports


def _variant(status: VariantStatus) -> VariantReport:
    return VariantReport(
        variant=status.variant,
        ready=status.ready,
        waiting=status.waiting,
        running=status.running,
        kv_usage=status.kv_blocks_used / status.kv_blocks if status.kv_blocks else 0.0,
        prefill_tokens_per_s=status.prefill_tokens_per_s,
        decode_tokens_per_s=status.decode_tokens_per_s,
        decode_tokens_total=status.decode_tokens_total,
    )
