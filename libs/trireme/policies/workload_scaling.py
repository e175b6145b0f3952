"""Which workloads of a cluster to scale, so that each worker group has as many workers as are wanted.

Pure: no clock, no I/O. A cluster's API says who owns the number of replicas; what belongs to
someone else (an autoscaler, a person) is left alone, with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from trireme.policies.placement import GroupTarget

PLACEMENT = "placement"
"""What a workload is labelled with where placement is to scale it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldOwner:
    """One who set a field, as the API's field management tells."""

    manager: str
    ours: bool
    """True where this is the very entry that placement writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSnapshot:
    """The workload of one worker group."""

    group: str
    replicas: int
    """Wanted by its specification."""
    scaled_by: str
    """Its label: `placement`, or who else scales it."""
    owners: tuple[FieldOwner, ...] = ()
    """Of the number of replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleWorkload:
    """Set the number of replicas."""

    group: str
    replicas: int
    take_over: bool
    """Take the number from its owners: all of them are known to give it up."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveWorkload:
    """Do nothing, though the number differs or is not ours to set."""

    group: str
    reason: str


Step: TypeAlias = ScaleWorkload | LeaveWorkload


def plan(
    targets: Sequence[GroupTarget], workloads: Mapping[str, WorkloadSnapshot], *, yielding: frozenset[str]
) -> list[Step]:
    """One step for each group that is not as wanted, in the order of `targets`.

    Args:
        targets: what is wanted.
        workloads: by group.
        yielding: managers that the number may be taken from, beside placement itself.
    """
    steps = (_step(target, workloads.get(target.group), yielding) for target in targets)
    return [step for step in steps if step is not None]


def _step(target: GroupTarget, workload: WorkloadSnapshot | None, yielding: frozenset[str]) -> Step | None:
    group, wanted = target.group, target.replicas
    if workload is None:
        return LeaveWorkload(group=group, reason="no workload is labelled for this group")
    if workload.scaled_by != PLACEMENT and workload.replicas == wanted:
        return None
    if workload.scaled_by != PLACEMENT:
        return LeaveWorkload(group=group, reason=f"its workload is scaled by {workload.scaled_by}")
    others = [owner for owner in workload.owners if not owner.ours]
    if workload.replicas == wanted:
        if len(others) < len(workload.owners):
            return None
        reason = f"{wanted} as wanted, to be held"
        return ScaleWorkload(group=group, replicas=wanted, take_over=False, reason=reason)
    strangers = sorted({owner.manager for owner in others} - yielding)
    if strangers:
        names = ", ".join(strangers)
        reason = f"its replicas, {workload.replicas}, were set by {names}; {wanted} are wanted"
        return LeaveWorkload(group=group, reason=reason)
    reason = f"{wanted} wanted, {workload.replicas} set"
    return ScaleWorkload(group=group, replicas=wanted, take_over=bool(others), reason=reason)
