"""Ask everything about a fleet at once, each question with a time limit: half of it may be dead."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from redis.exceptions import RedisError

from trireme.bus.connection import Keys
from trireme.bus.registry import Registry, code_version
from trireme.cli.doctoring.facts import (
    DiskFacts,
    FleetFacts,
    GroupFacts,
    LogError,
    PlacementFacts,
    ProcessFacts,
    RedisFacts,
    Sample,
    StreamFacts,
    WorkerPlace,
)
from trireme.cli.doctoring.redaction import Redactor, secret_values
from trireme.cli.fleet_processes import local_address
from trireme.cli.fleet_report import bus_of
from trireme.cli.placement_client import placement_state
from trireme.cli.readiness import health_of
from trireme.cli.run_directory import FleetState, RunDirectory, SupervisedProcess
from trireme.cli.tls_directory import speak_as_fleet
from trireme.client.credentials import API_KEY_VARIABLE, call_metadata, client_ssl_context
from trireme.errors import InvalidConfiguration
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as placement_pb

ANSWER_S = 3.0
"""Whoever takes longer does not answer."""
MAX_METRICS_BYTES = 2 * 2**20
MAX_LOG_BYTES = 256 * 2**10
MAX_LOGS = 64
MAX_PROCESSES = 256
JUDGED = frozenset(
    {
        "trireme_engine_last_turn_age_seconds",
        "trireme_scheduler_oldest_seconds",
        "trireme_scheduler_waiting_requests",
        "trireme_engine_running_sequences",
        "trireme_engine_waiting_sequences",
        "trireme_kv_serving",
        "trireme_kv_capacity_bytes",
        "trireme_kv_corrupt_total",
        "trireme_kv_peer_corrupt_total",
        "trireme_power_reading_age_seconds",
        "trireme_carbon_signal_age_seconds",
    }
)
"""Metrics that rules look at."""
_SETTINGS = ("TRIREME_", "OTEL_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found: facts for the rules, and papers for the bundle, none of which holds a secret."""

    facts: FleetFacts
    papers: Mapping[str, str] = field(default_factory=dict)
    """By name in the bundle."""


async def look_at(state: FleetState, run_directory: RunDirectory) -> Look:
    """Look once; whatever does not answer is told as such, and nothing is raised for it."""
    speak_as_fleet(state.tls)
    environs = {process.pid: _environ(process.pid) for process in state.processes if process.pid}
    hidden = secret_values({"REDIS_URL": state.redis_url})
    for environ in environs.values():
        hidden |= secret_values(environ)
    redactor = Redactor(hidden)
    async with bus_of(state) as redis:
        bus, records = await _ask_bus(redis, Keys(state.bus_prefix))
    placement, (processes, pages) = await asyncio.gather(
        _ask_placement(records), _ask_processes(state, records, environs, redactor)
    )
    logs = await asyncio.to_thread(_logs, run_directory, redactor)
    lives = state.supervisor_lives
    facts = FleetFacts(
        taken_unix_s=time.time(),
        run_dir=str(run_directory.path),
        fleet_file=state.fleet,
        phase=state.phase,
        supervisor_lives=lives,
        startup_error=redactor.text(state.error),
        waiting_for=state.waiting_for,
        redis=replace(bus, error=redactor.text(bus.error), write_error=redactor.text(bus.write_error)),
        placement=placement,
        processes=tuple(processes),
        disks=tuple(_disks(state, run_directory)),
        log_errors=tuple(
            found for name, text in logs.items() if (found := last_error(name, text)) is not None
        ),
        version=code_version(),
        cpu_kernels=_cpu_kernels(records) if lives else None,
    )
    papers = {f"metrics/{name}.txt": redactor.text(page) for name, page in pages.items()}
    papers |= {f"logs/{name}.log": text for name, text in logs.items()}
    papers["fleet.yaml"] = _fleet_file(state.fleet, redactor)
    return Look(facts=facts, papers=papers)


def last_error(process: str, log: str) -> LogError | None:
    """The last line of a log that tells of an error, or the last traceback's end."""
    for line in reversed(log.splitlines()):
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and fields.get("level") in ("error", "critical"):
            exception = str(fields.get("exception", "")).strip().splitlines()
            return LogError(
                process=process,
                event=str(fields.get("event", ""))[:200],
                detail=exception[-1][:500] if exception else str(fields.get("error", ""))[:500],
            )
    raised = log.rpartition("Traceback (most recent call last):")[2] if "Traceback (most" in log else ""
    ends = [line for line in raised.splitlines() if line and not line.startswith((" ", "{", "\t"))]
    return LogError(process=process, event="traceback", detail=ends[0][:500]) if ends else None


async def _ask_bus(redis: Redis, keys: Keys) -> tuple[RedisFacts, list[ProcessRecord]]:
    try:
        async with asyncio.timeout(ANSWER_S):
            asked_s = time.time()
            seconds, micros = await redis.time()
            ahead_s = (asked_s + time.time()) / 2 - (seconds + micros / 1e6)
            info = await cast("Awaitable[dict[str, object]]", redis.info())
    except (RedisError, OSError) as error:
        return RedisFacts(answers=False, error=str(error) or type(error).__name__), []
    write_error, records = "", []
    try:
        async with asyncio.timeout(ANSWER_S):
            await redis.set(f"{keys.prefix}:doctor:{secrets.token_hex(4)}", b"", px=1000)
    except (RedisError, OSError) as error:
        write_error = str(error) or type(error).__name__
    streams: list[StreamFacts] = []
    with contextlib.suppress(RedisError, OSError):
        async with asyncio.timeout(ANSWER_S):
            records = (await Registry(redis, keys).living())[:MAX_PROCESSES]
            names = [keys.requests, keys.events, keys.measurements, keys.directives, keys.residency]
            names += [keys.assignments(record.id) for record in records if record.service == "worker"]
            for name in names:
                streams.append(await _ask_stream(redis, name))
    told = {name: str(value) for name, value in info.items() if not isinstance(value, (dict, list))}
    return (
        RedisFacts(
            answers=True, write_error=write_error, info=told, clock_ahead_s=ahead_s, streams=tuple(streams)
        ),
        records,
    )


async def _ask_stream(redis: Redis, name: str) -> StreamFacts:
    length = int(await redis.xlen(name))
    lag = pending = 0
    if length or await redis.exists(name):
        for group in await redis.xinfo_groups(name):
            lag += int(group.get("lag") or 0)
            pending += int(group.get("pending") or 0)
    return StreamFacts(name=name, length=length, lag=lag, pending=pending)


async def _ask_placement(records: list[ProcessRecord]) -> PlacementFacts:
    try:
        async with asyncio.timeout(ANSWER_S):
            state = await placement_state(records)
    except TimeoutError:
        state = None
    if state is None:
        return PlacementFacts(answers=False)
    return PlacementFacts(
        answers=True,
        groups=tuple(
            GroupFacts(
                name=group.group,
                desired=group.desired_replicas,
                ready=group.ready_replicas,
                variants=tuple(group.desired_variants),
            )
            for group in state.groups
        ),
        workers=tuple(
            WorkerPlace(
                name=f"{worker.group}-{worker.index}",
                phase=placement_pb.WorkerPhase.Name(worker.phase).removeprefix("WORKER_PHASE_").lower(),
                restarts=worker.restarts,
                last_exit=worker.last_exit,
                crash_looping=worker.crash_looping,
                load_error=worker.load_error,
                worker_id=worker.worker_id,
                group=worker.group,
            )
            for worker in state.workers
        ),
    )


async def _ask_processes(
    state: FleetState,
    records: list[ProcessRecord],
    environs: Mapping[int, Mapping[str, str]],
    redactor: Redactor,
) -> tuple[list[ProcessFacts], dict[str, str]]:
    by_pid = {record.pid: record for record in records if record.node in ("", state.node)}
    known: list[tuple[SupervisedProcess | None, ProcessRecord | None]] = [
        (process, by_pid.get(process.pid) if process.pid else None) for process in state.processes
    ]
    told = {record.id for _, record in known if record is not None}
    known += [(None, record) for record in records if record.id not in told]
    asked = [_ask_process(process, record, environs, redactor) for process, record in known[:MAX_PROCESSES]]
    answers = await asyncio.gather(*asked)
    return [facts for facts, _ in answers], {facts.name: page for facts, page in answers if page}


async def _ask_process(
    process: SupervisedProcess | None,
    record: ProcessRecord | None,
    environs: Mapping[int, Mapping[str, str]],
    redactor: Redactor,
) -> tuple[ProcessFacts, str]:
    found = record if record is not None else ProcessRecord()
    health, page, metrics_error = "", "", ""
    if record is not None:
        health, (page, metrics_error) = await asyncio.gather(
            _health(record), asyncio.to_thread(_page, record)
        )
    pid = process.pid if process is not None else found.pid
    own = environs.get(pid, {})
    facts = ProcessFacts(
        name=process.name if process is not None else found.id,
        service=process.service if process is not None else found.service,
        node=found.node,
        pid=pid,
        supervised=process is not None,
        registered=record is not None,
        healthy=found.healthy,
        status=found.status,
        health=health,
        version=found.version,
        grpc_address=found.grpc_address,
        http_address=found.http_address,
        started_unix_s=found.started_unix_s or (process.started_unix_s if process is not None else 0.0),
        restarts=process.restarts if process is not None else 0,
        last_exit=process.last_exit if process is not None else "",
        crash_looping=process is not None and process.crash_looping,
        draining=found.worker.draining,
        ready_variants=tuple(variant.variant for variant in found.worker.variants if variant.ready),
        settings=redactor.settings({k: v for k, v in own.items() if k.startswith(_SETTINGS)}),
        samples=tuple(judged_samples(page)),
        metrics_error=metrics_error,
    )
    return facts, page


async def _health(record: ProcessRecord) -> str:
    if not record.grpc_address:
        return ""
    is_gateway = record.service == "gateway"
    return await health_of(record.grpc_address, is_gateway=is_gateway, timeout_s=ANSWER_S)


def _page(record: ProcessRecord) -> tuple[str, str]:
    """(the process's metrics, why there are none)."""
    if not record.http_address:
        return "", ""
    try:
        # Gateways show theirs where clients come in; inner services have a port of their own, in plaintext.
        is_gateway = record.service == "gateway"
        secure = client_ssl_context(None) if is_gateway else None
        headers = dict(call_metadata(None)) if is_gateway else {}
        address = local_address(record.http_address) if is_gateway else record.http_address
        scheme = "http" if secure is None else "https"
        asked = urllib.request.Request(f"{scheme}://{address}/metrics", headers=headers)
        with urllib.request.urlopen(asked, timeout=ANSWER_S, context=secure) as answer:
            return answer.read(MAX_METRICS_BYTES).decode(errors="replace"), ""
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "", f"it wants a key with the role metrics: set {API_KEY_VARIABLE}"
        return "", str(error)
    except (OSError, InvalidConfiguration) as error:
        return "", str(error)


def judged_samples(page: str) -> list[Sample]:
    """Of a /metrics page, what rules look at."""
    found = []
    with contextlib.suppress(ValueError):  # The rest of a page that is cut off is not needed.
        for family in text_string_to_metric_families(page):
            found += [Sample(s.name, s.value, dict(s.labels)) for s in family.samples if s.name in JUDGED]
    return found


def _environ(pid: int) -> dict[str, str]:
    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return {}


def _logs(run_directory: RunDirectory, redactor: Redactor) -> dict[str, str]:
    """The newest part of each log, by the process's name."""
    logs = {}
    paths = sorted(run_directory.logs.glob("*.log"), key=_written_unix_s, reverse=True)
    for path in paths[:MAX_LOGS]:
        try:
            with path.open("rb") as log:
                log.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
                text = log.read(MAX_LOG_BYTES).decode(errors="replace")
        except OSError:
            continue
        logs[path.stem] = "\n".join(redactor.log_line(line) for line in text.splitlines())
    return logs


def _written_unix_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _disks(state: FleetState, run_directory: RunDirectory) -> Iterable[DiskFacts]:
    seen = set()
    paths = [run_directory.path, run_directory.path / "kv", run_directory.redis_data, Path("/dev/shm")]
    for path in paths:
        try:
            device, usage = path.stat().st_dev, shutil.disk_usage(path)
        except OSError:
            continue
        if device not in seen:
            seen.add(device)
            yield DiskFacts(path=str(path), free_bytes=usage.free, total_bytes=usage.total)


def _cpu_kernels(records: list[ProcessRecord]) -> bool | None:
    if not any(record.worker.device == "cpu" for record in records if record.service == "worker"):
        return None
    # Looked for, not imported: that would take PyTorch.
    found = importlib.util.find_spec("trireme.kernels")
    folders = found.submodule_search_locations if found is not None else None
    return any(any(Path(folder).glob("libtrireme_cpu*.so")) for folder in folders or ())


def _fleet_file(path: str, redactor: Redactor) -> str:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"# it cannot be read: {type(error).__name__}\n"
    return yaml.safe_dump(redactor.value(document), sort_keys=False)
