"""Which workers to start, drain, kill, load or unload, so that the living fleet becomes the desired one.

Pure: no clock, no I/O. A plan is small steps; the caller carries them out, looks again and
plans again. Planners that move the desired state (variant mixes, device slices) come before
this and leave it as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTarget:
    """What one worker group should be."""

    group: str
    replicas: int
    variants: tuple[str, ...]
    """Variants that each of its workers should serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One living worker process."""

    pid: int
    group: str
    index: int
    """Its number within the group; free again when it is gone."""
    age_s: float
    """Since its start."""
    worker_id: str = ""
    """Its id in the registry; empty until it registered."""
    lease_lost_s: float | None = None
    """Since its lease ended; None while it holds or before it registered."""
    ready: bool = False
    """Registered, in progress and taking requests."""
    draining_s: float | None = None
    """Since it was told to drain; None where it was not."""
    variants: frozenset[str] = frozenset()
    """What it serves or loads."""
    own_variants: tuple[str, ...] | None = None
    """What this one worker should serve, where that differs from its group."""
    loading: bool = False
    """A load or unload that was asked for has not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient and how generous the plan is."""

    surge: int = 1
    """Processes a group may have above its replicas while old ones drain."""
    lease_grace_s: float = 5.0
    """A process may live so long without a lease before it is killed."""
    start_timeout_s: float = 180.0
    """A process may live so long before it registers."""
    drain_timeout_s: float = 30.0
    """A draining process may live so long."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    group: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class DrainWorker:
    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class KillWorker:
    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class LoadVariant:
    pid: int
    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnloadVariant:
    pid: int
    variant: str
    reason: str


Action: TypeAlias = StartWorker | DrainWorker | KillWorker | LoadVariant | UnloadVariant


def plan(
    targets: Sequence[GroupTarget],
    workers: Sequence[WorkerSnapshot],
    *,
    limits: Limits,
    waiting: Mapping[tuple[str, int], float] | None = None,
) -> tuple[Action, ...]:
    """The next steps towards `targets`; none where the fleet is as desired.

    A ready worker of a wanted group is drained only while its group has more than its
    replicas, and killed never. Starts keep a group's processes within replicas + surge.

    Args:
        waiting: (group, index) -> seconds until it may be started again after a death.
    """
    actions: list[Action] = []
    for target in targets:
        members = [worker for worker in workers if worker.group == target.group]
        actions += _plan_group(target, members, limits, waiting or {})
    wanted = {target.group for target in targets}
    for worker in workers:
        if worker.group not in wanted:
            actions += _retire(worker, limits, f"group {worker.group!r} is no longer wanted")
    return tuple(actions)


def _plan_group(
    target: GroupTarget,
    members: Sequence[WorkerSnapshot],
    limits: Limits,
    waiting: Mapping[tuple[str, int], float],
) -> list[Action]:
    actions: list[Action] = []
    kept: list[WorkerSnapshot] = []
    replaced_later = 0  # under its own number, when it is gone: its history of deaths stays with it
    for worker in members:
        why = _hopeless(worker, limits)
        if why is not None:
            actions.append(KillWorker(worker.pid, why))
            replaced_later += worker.draining_s is None
        elif worker.draining_s is None:
            kept.append(worker)
    # Whoever serves already stays; among equals the lower number, then the older process.
    kept.sort(key=lambda worker: (not worker.ready, worker.index, -worker.age_s, worker.pid))
    for worker in kept[target.replicas :]:
        actions += _retire(worker, limits, f"{len(kept)} workers where {target.replicas} are wanted")
    del kept[target.replicas :]

    missing = target.replicas - len(kept) - replaced_later
    room = target.replicas + limits.surge - len(members)
    taken = {worker.index for worker in members}
    free = (index for index in range(target.replicas + len(members)) if index not in taken)
    reason = f"{len(kept)} of {target.replicas} workers live"
    for index in itertools.islice(free, max(0, min(missing, room))):
        # A number that waits after a death still counts, or its group would start another in its place.
        if waiting.get((target.group, index), 0.0) <= 0.0:
            actions.append(StartWorker(target.group, index, reason))

    for worker in kept:
        if worker.ready and not worker.loading:
            actions += _change_variants(worker, target)
    return actions


def _hopeless(worker: WorkerSnapshot, limits: Limits) -> str | None:
    lost_s, draining_s = worker.lease_lost_s, worker.draining_s
    if draining_s is not None and draining_s > limits.drain_timeout_s:
        return f"still there {draining_s:.0f} s after it was told to drain"
    if lost_s is not None and lost_s > limits.lease_grace_s:
        return f"lives but made no progress: its lease ended {lost_s:.1f} s ago"
    if not worker.worker_id and draining_s is None and worker.age_s > limits.start_timeout_s:
        return f"did not register within {limits.start_timeout_s:.0f} s of its start"
    return None


def _retire(worker: WorkerSnapshot, limits: Limits, reason: str) -> list[Action]:
    why = _hopeless(worker, limits)
    if why is not None:
        return [KillWorker(worker.pid, why)]
    if worker.draining_s is None:
        return [DrainWorker(worker.pid, reason)]
    return []


def _change_variants(worker: WorkerSnapshot, target: GroupTarget) -> list[Action]:
    """One change at a time, loads first: a model must not lose its last variant to make room."""
    wanted = target.variants if worker.own_variants is None else worker.own_variants
    of_whom = f"group {target.group!r}" if worker.own_variants is None else "this worker"
    for variant in wanted:
        if variant not in worker.variants:
            return [LoadVariant(worker.pid, variant, f"{of_whom} should serve {variant}")]
    for variant in sorted(worker.variants - set(wanted)):
        return [UnloadVariant(worker.pid, variant, f"{of_whom} should not serve {variant}")]
    return []
