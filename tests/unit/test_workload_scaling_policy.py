"""Workloads of a cluster are scaled to what is wanted, but never against another owner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trireme.policies.placement import GroupTarget
from trireme.policies.workload_scaling import FieldOwner, ScaleWorkload, WorkloadSnapshot, plan

OURS = FieldOwner(manager="trireme-placement", ours=True)
HELM = FieldOwner(manager="helm", ours=False)
HPA = FieldOwner(manager="kube-controller-manager", ours=False)
YIELDING = frozenset({"helm", "trireme-placement"})


def target(replicas: int) -> GroupTarget:
    return GroupTarget(group="g", replicas=replicas, variants=())


def workload(replicas: int, *owners: FieldOwner, scaled_by: str = "placement") -> dict[str, WorkloadSnapshot]:
    return {"g": WorkloadSnapshot(group="g", replicas=replicas, scaled_by=scaled_by, owners=tuple(owners))}


def test_what_is_wanted_and_held_needs_nothing() -> None:
    assert plan([target(3)], workload(3, OURS), yielding=YIELDING) == []


def test_only_who_yields_is_forced() -> None:
    (step,) = plan([target(3)], workload(1, HELM), yielding=YIELDING)
    assert isinstance(step, ScaleWorkload) and step.take_over
    (step,) = plan([target(3)], workload(1, OURS), yielding=YIELDING)
    assert isinstance(step, ScaleWorkload) and not step.take_over
    (step,) = plan([target(3)], workload(1, HELM, HPA), yielding=YIELDING)
    assert not isinstance(step, ScaleWorkload) and "kube-controller-manager" in step.reason


def test_placements_own_number_written_another_way_is_taken() -> None:
    other_way = FieldOwner(manager="trireme-placement", ours=False)
    (step,) = plan([target(3)], workload(1, other_way), yielding=YIELDING)
    assert isinstance(step, ScaleWorkload) and step.take_over


def test_a_missing_workload_is_told() -> None:
    (step,) = plan([target(3)], {}, yielding=YIELDING)
    assert "no workload" in step.reason


owners = st.lists(st.sampled_from([OURS, HELM, HPA]), unique=True)


@given(st.integers(0, 9), st.integers(0, 9), owners, st.sampled_from(["placement", "hpa", "no one"]))
def test_a_step_never_changes_what_a_stranger_set(
    wanted: int, there: int, owned_by: list[FieldOwner], scaled_by: str
) -> None:
    steps = plan([target(wanted)], workload(there, *owned_by, scaled_by=scaled_by), yielding=YIELDING)
    for step in steps:
        if isinstance(step, ScaleWorkload):
            assert scaled_by == "placement" and step.replicas == wanted
            assert wanted == there or HPA not in owned_by
    if wanted != there:
        assert len(steps) == 1
