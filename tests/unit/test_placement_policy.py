"""plan: the living workers become the desired ones, in small safe steps."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.placement import (
    Action,
    DrainWorker,
    GroupTarget,
    KillWorker,
    Limits,
    LoadVariant,
    StartWorker,
    UnloadVariant,
    WorkerSnapshot,
    plan,
)
from trireme.policies.restarts import (
    CRASH_LOOP_DEATHS,
    LONGEST_DELAY_S,
    STABLE_S,
    RestartHistory,
    after_death,
)

LIMITS = Limits(surge=1, lease_grace_s=5.0, start_timeout_s=60.0, drain_timeout_s=30.0)


def target(replicas: int, group: str = "g", variants: tuple[str, ...] = ("a",)) -> GroupTarget:
    return GroupTarget(group=group, replicas=replicas, variants=variants)


def ready(index: int, **changes: object) -> WorkerSnapshot:
    worker = WorkerSnapshot(
        pid=100 + index,
        group="g",
        index=index,
        age_s=50.0,
        worker_id=f"worker-{index}",
        ready=True,
        variants=frozenset({"a"}),
    )
    return replace(worker, **changes)  # type: ignore[arg-type]


def test_a_fleet_that_is_as_desired_is_left_alone() -> None:
    assert plan([target(2)], [ready(0), ready(1)], limits=LIMITS) == ()


def test_missing_workers_take_the_lowest_free_numbers() -> None:
    actions = plan([target(3)], [ready(1)], limits=LIMITS)
    assert [(a.group, a.index) for a in actions if isinstance(a, StartWorker)] == [("g", 0), ("g", 2)]


def test_scaling_down_drains_who_does_not_serve_before_who_does() -> None:
    loading = ready(0, ready=False, worker_id="")
    actions = plan([target(1)], [loading, ready(1)], limits=LIMITS)
    assert actions == (DrainWorker(100, "2 workers where 1 are wanted"),)


def test_a_worker_whose_lease_ended_is_killed_after_the_grace_and_not_before() -> None:
    assert plan([target(1)], [ready(0, ready=False, lease_lost_s=5.0)], limits=LIMITS) == ()
    actions = plan([target(1)], [ready(0, ready=False, lease_lost_s=5.1)], limits=LIMITS)
    assert [type(action) for action in actions] == [KillWorker]
    assert "5.1 s ago" in actions[0].reason


def test_a_worker_that_never_registers_is_killed_after_the_start_timeout() -> None:
    silent = ready(0, ready=False, worker_id="", variants=frozenset())
    assert plan([target(1)], [replace(silent, age_s=60.0)], limits=LIMITS) == ()
    (action,) = plan([target(1)], [replace(silent, age_s=61.0)], limits=LIMITS)
    assert isinstance(action, KillWorker)


def test_a_drain_that_takes_too_long_ends_in_a_kill() -> None:
    (start, *rest) = plan([target(1)], [ready(0, draining_s=29.0)], limits=LIMITS)
    assert isinstance(start, StartWorker) and start.index == 1 and rest == []
    (kill,) = plan([target(0)], [ready(0, draining_s=31.0)], limits=LIMITS)
    assert isinstance(kill, KillWorker)


def test_draining_workers_hold_back_starts_beyond_the_surge() -> None:
    draining = [ready(index, draining_s=1.0) for index in range(3)]
    actions = plan([target(3)], draining, limits=LIMITS)
    assert [action.index for action in actions if isinstance(action, StartWorker)] == [3]


def test_a_number_that_waits_after_a_death_is_neither_started_nor_replaced_by_another() -> None:
    assert plan([target(1)], [], limits=LIMITS, waiting={("g", 0): 2.0}) == ()
    assert len(plan([target(1)], [], limits=LIMITS, waiting={("g", 0): 0.0})) == 1


def test_a_variant_is_loaded_before_another_is_given_up() -> None:
    worker = ready(0, variants=frozenset({"a"}))
    wanted = [target(1, variants=("b",))]
    (load,) = plan(wanted, [worker], limits=LIMITS)
    assert load == LoadVariant(100, "b", "group 'g' should serve b")
    (unload,) = plan(wanted, [replace(worker, variants=frozenset({"a", "b"}))], limits=LIMITS)
    assert isinstance(unload, UnloadVariant) and unload.variant == "a"
    assert plan(wanted, [replace(worker, loading=True)], limits=LIMITS) == ()


def test_a_worker_may_serve_other_variants_than_its_group() -> None:
    (load,) = plan([target(1)], [ready(0, own_variants=("a", "b"))], limits=LIMITS)
    assert isinstance(load, LoadVariant) and load.variant == "b"


def test_workers_of_a_group_that_is_not_wanted_any_more_drain() -> None:
    (drain,) = plan([target(0, group="other")], [ready(0)], limits=LIMITS)
    assert isinstance(drain, DrainWorker)


# A model of the machine: each plan is carried out, then time passes and processes change.

groups = st.sampled_from(["g", "h"])
snapshots = st.builds(
    WorkerSnapshot,
    pid=st.integers(1, 10**6),
    group=groups,
    index=st.integers(0, 5),
    age_s=st.floats(0, 100),
    worker_id=st.sampled_from(["", "w"]),
    lease_lost_s=st.none() | st.floats(0, 20),
    ready=st.booleans(),
    draining_s=st.none() | st.floats(0, 60),
    variants=st.frozensets(st.sampled_from(["a", "b", "c"])),
    loading=st.booleans(),
).map(lambda w: replace(w, ready=w.ready and bool(w.worker_id) and w.lease_lost_s is None))
fleets = st.lists(snapshots, max_size=8, unique_by=lambda worker: worker.pid)
targets = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(
    lambda counts: [target(counts[0], "g", ("a", "b")), target(counts[1], "h", ("c",))]
)


def carry_out(workers: list[WorkerSnapshot], actions: tuple[Action, ...], pid: int) -> list[WorkerSnapshot]:
    by_pid = {worker.pid: worker for worker in workers}
    for action in actions:
        match action:
            case StartWorker(group, index, _):
                pid += 1
                by_pid[pid] = WorkerSnapshot(pid=pid, group=group, index=index, age_s=0.0)
            case DrainWorker(drained, _):
                by_pid[drained] = replace(by_pid[drained], draining_s=0.0)
            case KillWorker(killed, _):
                del by_pid[killed]
            case LoadVariant(loading, variant, _):
                by_pid[loading] = replace(by_pid[loading], variants=by_pid[loading].variants | {variant})
            case UnloadVariant(loading, variant, _):
                by_pid[loading] = replace(by_pid[loading], variants=by_pid[loading].variants - {variant})
    return list(by_pid.values())


def live(workers: list[WorkerSnapshot]) -> list[WorkerSnapshot]:
    """A while passes: who drains ends, who starts registers, who is stuck stays stuck."""
    later = []
    for worker in workers:
        if worker.draining_s is not None and worker.lease_lost_s is None:
            continue
        if worker.lease_lost_s is not None:
            worker = replace(worker, lease_lost_s=worker.lease_lost_s + 10.0)
        elif not worker.worker_id or not worker.ready:
            worker = replace(worker, worker_id=f"w{worker.pid}", ready=True)
        if worker.draining_s is not None:
            worker = replace(worker, draining_s=worker.draining_s + 40.0)
        later.append(replace(worker, age_s=worker.age_s + 10.0, loading=False))
    return later


@settings(max_examples=300)
@given(workers=fleets, wanted=targets)
def test_from_any_state_the_fleet_becomes_the_desired_one_and_then_rests(
    workers: list[WorkerSnapshot], wanted: list[GroupTarget]
) -> None:
    for turn in range(40):
        actions = plan(wanted, workers, limits=LIMITS)
        if not actions and live(workers) == [replace(w, age_s=w.age_s + 10.0) for w in workers]:
            break
        workers = live(carry_out(workers, actions, 10**7 + turn * 100))
    else:
        raise AssertionError(f"still acting: {actions}")
    for one in wanted:
        members = [worker for worker in workers if worker.group == one.group]
        assert len(members) == one.replicas
        assert all(worker.ready and worker.variants == set(one.variants) for worker in members)


@settings(max_examples=300)
@given(workers=fleets, wanted=targets)
def test_no_plan_goes_beyond_replicas_and_surge_or_ends_a_healthy_wanted_worker(
    workers: list[WorkerSnapshot], wanted: list[GroupTarget]
) -> None:
    actions = plan(wanted, workers, limits=LIMITS)
    assert all(action.reason for action in actions)
    after = carry_out(workers, actions, 10**7)
    for one in wanted:
        before_count = sum(worker.group == one.group for worker in workers)
        after_count = sum(worker.group == one.group for worker in after)
        assert after_count <= max(before_count, one.replicas + LIMITS.surge)
        serving = [w for w in workers if w.group == one.group and w.ready and w.draining_s is None]
        ended = {a.pid for a in actions if isinstance(a, DrainWorker | KillWorker)}
        killed = {a.pid for a in actions if isinstance(a, KillWorker)}
        assert not killed & {worker.pid for worker in serving}
        still = [worker for worker in serving if worker.pid not in ended]
        assert len(still) == min(len(serving), one.replicas)


def test_the_first_restart_is_prompt_and_the_next_ones_wait_ever_longer() -> None:
    history, delays = RestartHistory(), []
    for _ in range(12):
        history = after_death(history, lived_s=0.1, now_s=100.0)
        delays.append(history.not_before_s - 100.0)
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert delays[-1] == LONGEST_DELAY_S
    assert history.restarts == 12 and history.is_crash_looping


def test_a_process_that_lived_long_is_no_crash_loop() -> None:
    history = RestartHistory()
    for _ in range(CRASH_LOOP_DEATHS + 1):
        history = after_death(history, lived_s=STABLE_S, now_s=0.0)
    assert not history.is_crash_looping and history.not_before_s == 0.25
