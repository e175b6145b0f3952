"""What is wrong with a fleet, likely cause first.

Pure rules over facts. Each looks at one kind of trouble and says what it saw and what to do. They
stand in the order in which one trouble explains another: without a bus nothing registers, without workers
requests wait.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trireme.cli.doctoring.facts import FleetFacts, LogError, ProcessFacts, WorkerPlace

LEAST_FREE_BYTES = 512 * 2**20
LEAST_FREE_SHARE = 0.02
"""A disk with less than both left is full for what a fleet writes."""
SKEW_S = 1.0
"""Leases hold for three seconds, deadlines are times of day."""
STALLED_S = 5.0
WAITING_S = 10.0
METER_SILENT_S = 60.0
CARBON_OLD_S = 6 * 3600.0


class Severity(enum.Enum):
    """What a finding means for clients."""

    FAILING = "failing"
    """Requests are not answered, or soon will not be."""
    DEGRADED = "degraded"
    """Slower, dearer, or without a spare."""
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    code: str
    """Stable; for programs."""
    severity: Severity
    what: str
    """One sentence."""
    seen: tuple[str, ...] = ()
    """What it rests on."""
    advice: str


def findings(facts: FleetFacts) -> list[Finding]:
    """All that is wrong, likely cause first; empty where nothing is."""
    found = [finding for rule in RULES for finding in rule(facts)]
    # Trouble before its consequences, but what only costs speed after what fails requests.
    order = [Severity.FAILING, Severity.DEGRADED, Severity.NOTE]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def no_fleet(facts: FleetFacts) -> Iterator[Finding]:
    if facts.phase == "none":
        yield Finding(
            code="no_fleet",
            severity=Severity.FAILING,
            what=f"No fleet ever ran in {facts.run_dir}.",
            advice="Start one with `trireme up`, or name its run directory with --run-dir.",
        )
    elif facts.phase == "stopped" and not facts.supervisor_lives:
        yield Finding(
            code="stopped",
            severity=Severity.FAILING,
            what="The fleet was stopped.",
            advice="Start it with `trireme up`.",
        )


def start_failed(facts: FleetFacts) -> Iterator[Finding]:
    if facts.phase != "failed":
        return
    taken = "in use" in facts.startup_error or "cannot listen" in facts.startup_error
    yield Finding(
        code="port_taken" if taken else "start_failed",
        severity=Severity.FAILING,
        what="The fleet did not start: " + (facts.startup_error or "it does not say why") + ".",
        seen=_last_words(facts),
        advice="Free the port, or choose another one in fleet.yaml."
        if taken
        else "Mend that, then `trireme up`.",
    )


def supervisor_gone(facts: FleetFacts) -> Iterator[Finding]:
    if facts.phase in ("starting", "ready") and not facts.supervisor_lives:
        yield Finding(
            code="supervisor_gone",
            severity=Severity.DEGRADED if any(p.registered for p in facts.processes) else Severity.FAILING,
            what="The supervisor is gone; what dies now is not started again.",
            seen=(f"fleet.json says {facts.phase}, and its process does not live",),
            advice="Run `trireme down`, which ends what is left, then `trireme up`.",
        )


def bus_away(facts: FleetFacts) -> Iterator[Finding]:
    if facts.redis.answers or facts.phase in ("none", "stopped", "failed"):
        return
    own = [process for process in facts.of("redis") if process.supervised]
    seen = [f"Redis: {facts.redis.error}"]
    seen += [f"{p.name}: pid {p.pid or 'none'}, {p.restarts} restarts{_exit(p)}" for p in own]
    yield Finding(
        code="bus_away",
        severity=Severity.FAILING,
        what="Redis does not answer, so no request is taken and no process is seen alive.",
        seen=(*seen, *(f"log of {e.process}: {e.event} {e.detail}" for e in _errors_of(facts, "redis"))),
        advice="Answers under way go on. See why in the log of redis, or whether its host can be reached; "
        "all services come back by themselves when it does.",
    )


def bus_refuses(facts: FleetFacts) -> Iterator[Finding]:
    said, info = facts.redis.write_error, facts.redis.info
    if not said:
        return
    advice = "See what it says in its own log."
    if "MISCONF" in said:
        advice = "Its disk is full or failing: make room, then it takes writes again."
    elif "OOM" in said:
        advice = "Raise its maxmemory, or see which stream grows."
    elif "NOREPLICAS" in said:
        advice = "It waits for replicas (min-replicas-to-write): bring them back, or lower the number."
    elif "READONLY" in said:
        advice = "It is a replica now: point the fleet to the primary."
    used = (f"used_memory {info.get('used_memory_human', '?')}", f"role {info.get('role', '?')}")
    yield Finding(
        code="bus_refuses_writes",
        severity=Severity.FAILING,
        what="Redis answers, but refuses writes: requests cannot be made durable.",
        seen=(said, *used),
        advice=advice,
    )


def disk_full(facts: FleetFacts) -> Iterator[Finding]:
    for disk in facts.disks:
        if disk.free_bytes < min(LEAST_FREE_BYTES, LEAST_FREE_SHARE * disk.total_bytes):
            yield Finding(
                code="disk_full",
                severity=Severity.FAILING,
                what=f"The disk of {disk.path} is full.",
                seen=(f"{disk.free_bytes / 2**20:.0f} MiB of {disk.total_bytes / 2**30:.0f} GiB are free",),
                advice="Make room: without any, Redis takes no writes and the KV store keeps nothing.",
            )


def clock_skew(facts: FleetFacts) -> Iterator[Finding]:
    ahead_s = facts.redis.clock_ahead_s
    early = [p for p in facts.processes if p.started_unix_s > facts.taken_unix_s + SKEW_S]
    if abs(ahead_s) > SKEW_S or early:
        seen = [f"this clock is {ahead_s:+.1f} s ahead of Redis'"] if abs(ahead_s) > SKEW_S else []
        seen += [f"{p.name} on {p.node} started in the future" for p in early]
        yield Finding(
            code="clock_skew",
            severity=Severity.DEGRADED,
            what="Clocks differ: deadlines pass too soon or too late, and times in traces are off.",
            seen=tuple(seen),
            advice="Let all hosts follow one time server.",
        )


def load_failed(facts: FleetFacts) -> Iterator[Finding]:
    wanted = {group.name: set(group.variants) for group in facts.placement.groups}
    at = {process.name: set(process.ready_variants) for process in facts.of("worker")}
    failed = [
        place
        for place in facts.placement.workers
        if place.load_error and wanted.get(place.group, set()) - at.get(place.worker_id, set())
    ]
    if failed:
        ready = set().union(*at.values())
        yield Finding(
            code="variant_did_not_load",
            severity=Severity.DEGRADED if ready else Severity.FAILING,
            what="A variant did not load: " + failed[0].load_error.rstrip(".") + ".",
            seen=tuple(f"{place.name}: {place.load_error}" for place in failed),
            advice="Mend its checkpoint or its entry in fleet.yaml; placement tries again.",
        )


def workers_crash(facts: FleetFacts) -> Iterator[Finding]:
    looping = [place for place in facts.placement.workers if place.crash_looping]
    if not looping:
        return
    words = tuple(
        f"log of {error.process}: {error.event} {error.detail}"
        for place in looping
        for error in _errors_of(facts, place.name)
    )
    yield Finding(
        code="workers_crash",
        severity=Severity.DEGRADED if any(p.ready_variants for p in facts.of("worker")) else Severity.FAILING,
        what=f"{_count(len(looping), 'worker dies', 'workers die')} again and again soon after the start.",
        seen=(*(f"{p.name}: {p.restarts} deaths, last {p.last_exit}" for p in looping), *words),
        advice="The log says why: an unreadable checkpoint, too little memory, a device that is gone.",
    )


def no_worker(facts: FleetFacts) -> Iterator[Finding]:
    if not facts.redis.answers or facts.phase in ("none", "stopped", "failed"):
        return
    serving = [p for p in facts.of("worker") if p.registered and p.ready_variants and not p.draining]
    if serving or (facts.placement.groups and not any(group.desired for group in facts.placement.groups)):
        return
    living = [p for p in facts.of("worker") if p.registered]
    seen = [f"{p.name}: {p.status or p.health}" for p in living]
    seen += [f"{place.name}: {place.phase}{_exit(place)}" for place in facts.placement.workers]
    if living:
        what, advice = "No worker serves a variant yet.", "They load, drain or stall: see their logs."
    elif facts.placement.answers:
        what, advice = "No worker is alive.", "Placement starts them again; their logs say why they ended."
    else:
        what = "No worker is alive, and placement, which would start one, does not answer."
        advice = "On Kubernetes look at the workers' Deployments; here at the logs of placement and workers."
    yield Finding(code="no_worker", severity=Severity.FAILING, what=what, seen=tuple(seen), advice=advice)


def service_gone(facts: FleetFacts) -> Iterator[Finding]:
    if not facts.redis.answers or facts.phase in ("none", "stopped", "failed"):
        return
    vital = {"gateway": "clients reach nobody", "scheduler": "requests wait for ever"}
    for service in ("gateway", "scheduler", "placement", "kvstore", "power"):
        known = facts.of(service)
        gone = [p for p in known if not p.registered and p.supervised]
        nobody = not any(p.registered for p in known)
        if not gone and not (nobody and service in vital):
            continue
        failing = nobody and service in vital
        yield Finding(
            code=f"{service}_gone",
            severity=Severity.FAILING if failing else Severity.DEGRADED,
            what=f"No {service} lives: {vital[service]}." if failing else f"{gone[0].name} does not live.",
            seen=(
                *(f"{p.name}: pid {p.pid or 'none'}, {p.restarts} restarts{_exit(p)}" for p in gone),
                *(
                    f"log of {e.process}: {e.event} {e.detail}"
                    for p in gone
                    for e in _errors_of(facts, p.name)
                ),
            ),
            advice="It is started again where a supervisor lives; if it ends again, its log says why.",
        )


def silent_process(facts: FleetFacts) -> Iterator[Finding]:
    silent = [p for p in facts.processes if p.registered and p.health not in ("", "SERVING", "NOT_SERVING")]
    if silent:
        yield Finding(
            code="does_not_answer",
            severity=Severity.DEGRADED,
            what=f"{silent[0].name} is registered and does not answer its health check.",
            seen=tuple(f"{p.name} at {p.grpc_address}: {p.health}" for p in silent),
            advice="It hangs, or the network between is cut: see its log, and network policies.",
        )


def stalled_engine(facts: FleetFacts) -> Iterator[Finding]:
    for process in facts.of("worker"):
        age_s = max(process.values("trireme_engine_last_turn_age_seconds"), default=0.0)
        if age_s > STALLED_S:
            yield Finding(
                code="engine_stalled",
                severity=Severity.DEGRADED,
                what=f"The engine of {process.name} ends no step.",
                seen=(f"its last turn was {age_s:.0f} s ago",),
                advice="Its lease ends and its requests go elsewhere; if it comes again, see its log.",
            )


def queue_grows(facts: FleetFacts) -> Iterator[Finding]:
    schedulers = [p for p in facts.of("scheduler") if p.registered]
    oldest_s = max((v for p in schedulers for v in p.values("trireme_scheduler_oldest_seconds")), default=0.0)
    waiting = sum(v for p in schedulers for v in p.values("trireme_scheduler_waiting_requests"))
    unread = sum(stream.lag for stream in facts.redis.streams if stream.name.endswith(":requests"))
    if oldest_s > WAITING_S or (unread and not schedulers):
        busy = sum(v for p in facts.of("worker") for v in p.values("trireme_engine_running_sequences"))
        yield Finding(
            code="queue_grows",
            severity=Severity.DEGRADED,
            what=f"Requests wait {oldest_s:.0f} s for a worker.",
            seen=(f"{waiting:.0f} wait, {unread} unread, {busy:.0f} sequences run",),
            advice="Add workers (`trireme scale`), or admit less (`gateway.max_queue_requests`).",
        )


def workers_missing(facts: FleetFacts) -> Iterator[Finding]:
    for group in facts.placement.groups:
        if 0 < group.ready < group.desired:
            yield Finding(
                code="workers_missing",
                severity=Severity.DEGRADED,
                what=f"Group {group.name} has {group.ready} of {group.desired} workers.",
                seen=tuple(
                    f"{place.name}: {place.phase}{_exit(place)}"
                    for place in facts.placement.workers
                    if place.phase != "ready"
                ),
                advice="Requests go to the others meanwhile.",
            )


def versions_differ(facts: FleetFacts) -> Iterator[Finding]:
    running = {p.version for p in facts.processes if p.registered and p.version}
    if len(running) > 1:
        yield Finding(
            code="versions_differ",
            severity=Severity.DEGRADED,
            what=f"Processes of different versions run: {', '.join(sorted(running))}.",
            seen=tuple(f"{p.name}: {p.version}" for p in facts.processes if p.version),
            advice="Fine while an upgrade rolls; afterwards restart what is old.",
        )


def metrics_hidden(facts: FleetFacts) -> Iterator[Finding]:
    hidden = [p for p in facts.processes if p.metrics_error and p.health == "SERVING"]
    if hidden:
        yield Finding(
            code="metrics_hidden",
            severity=Severity.NOTE,
            what=f"{_count(len(hidden), 'process shows', 'processes show')} no metrics.",
            seen=tuple(f"{p.name}: {p.metrics_error}" for p in hidden),
            advice="Without them some kinds of trouble go unseen. Gateways with keys want one with the role "
            "metrics in TRIREME_API_KEY, gateways with TLS their authority in TRIREME_CLIENT_TLS_CA.",
        )


def kv_store_sick(facts: FleetFacts) -> Iterator[Finding]:
    for process in facts.of("kvstore"):
        held = {
            s.labels.get("tier"): s.value for s in process.samples if s.name == "trireme_kv_capacity_bytes"
        }
        for sample in process.samples:
            tier = sample.labels.get("tier", "")
            if sample.name == "trireme_kv_serving" and not sample.value and held.get(tier):
                yield Finding(
                    code="kv_tier_off",
                    severity=Severity.DEGRADED,
                    what=f"The {tier} tier of {process.name} is off; histories are computed again.",
                    advice="Its disk is gone, full or does not answer; the log of the store says which.",
                )
        corrupt = process.values("trireme_kv_corrupt_total") + process.values("trireme_kv_peer_corrupt_total")
        if sum(corrupt):
            yield Finding(
                code="kv_corrupt",
                severity=Severity.DEGRADED,
                what=f"{process.name} met KV blocks whose bytes were not those saved.",
                seen=(f"{sum(corrupt):.0f} since its start; each became a miss, no answer was touched",),
                advice="Suspect the disk, or memory without ECC, of that node.",
            )


def kernels_missing(facts: FleetFacts) -> Iterator[Finding]:
    if facts.cpu_kernels is False:
        yield Finding(
            code="cpu_kernels_missing",
            severity=Severity.DEGRADED,
            what="The CPU kernels are not built: PyTorch's are used, which are slower.",
            advice="Run `make kernels` where there is a C++ compiler, then restart the workers.",
        )


def meter_silent(facts: FleetFacts) -> Iterator[Finding]:
    for process in facts.of("power"):
        age_s = max(process.values("trireme_power_reading_age_seconds"), default=0.0)
        if age_s > METER_SILENT_S:
            yield Finding(
                code="meter_silent",
                severity=Severity.NOTE,
                what=f"A meter of {process.name} is silent for {age_s:.0f} s; the last tariff is billed.",
                advice="See docs/energy.md on what each meter needs.",
            )
        age_s = max(process.values("trireme_carbon_signal_age_seconds"), default=0.0)
        if age_s > CARBON_OLD_S:
            yield Finding(
                code="carbon_signal_old",
                severity=Severity.NOTE,
                what=f"The carbon signal is {age_s / 3600:.0f} h old.",
                advice="See docs/energy.md on its sources.",
            )


def still_starting(facts: FleetFacts) -> Iterator[Finding]:
    if facts.phase == "starting" and facts.supervisor_lives:
        yield Finding(
            code="starting",
            severity=Severity.NOTE,
            what="The fleet is starting"
            + (f" and waits for {facts.waiting_for}." if facts.waiting_for else "."),
            advice="Look again in a moment.",
        )


RULES: tuple[Callable[[FleetFacts], Iterator[Finding]], ...] = (
    no_fleet,
    start_failed,
    bus_away,
    disk_full,
    bus_refuses,
    load_failed,
    workers_crash,
    no_worker,
    service_gone,
    supervisor_gone,
    stalled_engine,
    silent_process,
    clock_skew,
    versions_differ,
    queue_grows,
    workers_missing,
    kv_store_sick,
    kernels_missing,
    meter_silent,
    metrics_hidden,
    still_starting,
)


def _errors_of(facts: FleetFacts, name: str) -> list[LogError]:
    return [error for error in facts.log_errors if error.process == name or error.process.endswith(name)]


def _last_words(facts: FleetFacts) -> tuple[str, ...]:
    return tuple(f"log of {error.process}: {error.event} {error.detail}" for error in facts.log_errors[:4])


def _exit(process: ProcessFacts | WorkerPlace) -> str:
    return f", last {process.last_exit}" if process.last_exit else ""


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
