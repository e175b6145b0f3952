"""The loop that makes a cluster's workloads as large as is wanted: look, plan, act, again.

Looking costs nothing: mirrors hold what the API told. Nothing is decided without leadership, or
on what was last confirmed too long ago.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque

from trireme.bus.connection import AWAY
from trireme.placement.kubernetes_api import (
    ApiConflict,
    ApiProblem,
    ApiThrottled,
    KubernetesApi,
)
from trireme.placement.kubernetes_lease import LeaderLease
from trireme.placement.kubernetes_mirror import Mirror
from trireme.placement.kubernetes_objects import WORKERS, WorkerPod, group_of, worker_pod, workload
from trireme.placement.replica_wishes import ReplicaWishes
from trireme.policies.placement import GroupTarget
from trireme.policies.workload_scaling import (
    PLACEMENT,
    LeaveWorkload,
    ScaleWorkload,
    WorkloadSnapshot,
    plan,
)
from trireme.runtime.clock import Clock
from trireme.runtime.health import Health
from trireme.runtime.shutdown import end_tasks

log = logging.getLogger(__name__)

STALLED_S = 30.0
"""A loop that did not look for so long makes no progress; a call takes 5 s at most."""
SETTLED_S = 5.0
"""A workload is not scaled again before a watch showed the last change, or this passed."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class KubernetesScaler:
    """Scales the worker groups of one release."""

    def __init__(
        self,
        api: KubernetesApi,
        wishes: ReplicaWishes,
        lease: LeaderLease,
        clock: Clock,
        *,
        release_selector: str,
        yielding: frozenset[str],
        period_s: float,
        watch_s: int,
        stale_s: float,
    ) -> None:
        self.wishes = wishes
        self.actions: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=32)
        self.left: dict[str, str] = {}
        """Why a group is not scaled though another number is wanted."""
        self.lease = lease
        self._api = api
        self._clock = clock
        self._yielding = yielding
        self._period_s = period_s
        self._stale_s = stale_s
        self._wake = asyncio.Event()
        self._looked_at_s = clock.monotonic_s()
        self._acted: dict[str, tuple[str, float]] = {}
        """By group: the version that was acted on, and when."""
        self._refused: dict[str, tuple[int, str]] = {}
        """By group: a number that the API did not let be set, and why."""
        self._failures: Counter[str] = Counter()
        self._retry_at_s: dict[str, float] = {}
        self._bus_is_away = False
        self._status = "degraded: the cluster's workloads have not been listed yet"
        selector = f"{release_selector},{WORKERS}"
        self.deployments = Mirror(
            "deployments",
            selector,
            list_all=api.list_deployments,
            watch=api.watch_deployments,
            watch_s=watch_s,
            clock=clock,
            on_change=self.wake,
        )
        self.pod_mirror = Mirror(
            "pods",
            selector,
            list_all=api.list_pods,
            watch=api.watch_pods,
            watch_s=watch_s,
            clock=clock,
            on_change=lambda: None,
        )

    def wake(self) -> None:
        """Look at once: what is wanted or what is there changed."""
        self._wake.set()

    def health(self) -> Health:
        """Progress of the loop; its status says what holds scaling up."""
        age_s = self._clock.monotonic_s() - self._looked_at_s
        if age_s > STALLED_S:
            return Health(healthy=False, status=f"looked at the cluster {age_s:.0f} s ago")
        return Health(healthy=True, status=self._status)

    def workloads(self) -> dict[str, WorkloadSnapshot]:
        """The worker groups' workloads as last seen, by group."""
        return {group_of(found): workload(found) for found in self.deployments.objects.values()}

    def pods(self) -> list[WorkerPod]:
        """The workers' pods as last seen."""
        return [worker_pod(found) for found in self.pod_mirror.objects.values()]

    def targets(self) -> list[GroupTarget]:
        """What is wanted, in the order of fleet.yaml; of a group that others scale, what they set."""
        workloads = self.workloads()
        targets = []
        for target in self.wishes.targets():
            seen = workloads.get(target.group)
            if seen is not None and seen.scaled_by != PLACEMENT:
                target = GroupTarget(group=target.group, replicas=seen.replicas, variants=target.variants)
            targets.append(target)
        return targets

    async def run(self) -> None:
        """Scale for ever."""
        loops = (self.deployments.run(), self.pod_mirror.run(), self.lease.run(), self._reconcile())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            # A TaskGroup would cancel them once, which one that asks Redis may not hear.
            await end_tasks(tasks)

    async def _reconcile(self) -> None:
        while True:
            await self.step()
            self._wake.clear()
            try:
                async with asyncio.timeout(self._period_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def step(self) -> None:
        """Look, plan and act once."""
        try:
            await self.wishes.refresh()
            self._bus_is_away = False
        except AWAY:
            self._bus_is_away = True
        steps = self.look()
        if self.lease.held() and self.deployments.age_s() <= self._stale_s:
            for step in steps:
                await self._act(step)
        self._looked_at_s = self._clock.monotonic_s()

    def look(self) -> list[ScaleWorkload]:
        """What is to be done, and what is left alone and why; every replica looks, the leader acts."""
        self._status = self._held_up_by()
        if self.deployments.age_s() == float("inf"):
            return []
        left, steps = {}, []
        for step in plan(self.targets(), self.workloads(), yielding=self._yielding):
            match step:
                case LeaveWorkload(group=group, reason=reason):
                    left[group] = reason
                    if self.left.get(group) != reason:
                        self._note("leave", f"left {group} alone: {reason}")
                case ScaleWorkload():
                    steps.append(step)
        planned = {step.group: step.replicas for step in steps}
        self._refused = {
            group: refused for group, refused in self._refused.items() if planned.get(group) == refused[0]
        }
        self.left = left | {group: why for group, (_, why) in self._refused.items()}
        return steps

    def _held_up_by(self) -> str:
        """`ok`, or one sentence without figures that change: it is compared."""
        age_s, problem = self.deployments.age_s(), self.deployments.problem
        if age_s > self._stale_s:
            why = problem or self.lease.problem or "nothing was heard"
            return f"degraded: out of touch with the Kubernetes API, nothing is decided: {why}"
        if problem or self.lease.problem:
            return f"degraded: the Kubernetes API does not do as it should: {problem or self.lease.problem}"
        if self._bus_is_away:
            return "degraded: the bus is away, what is wanted may be old"
        if not self.lease.held():
            return f"standby: {self.lease.holder or 'nobody'} leads"
        return "ok"

    async def _act(self, step: ScaleWorkload) -> None:
        deployment = next(
            found for found in self.deployments.objects.values() if group_of(found) == step.group
        )
        version = str(deployment["metadata"]["resourceVersion"])
        if not self._may_act(step.group, version):
            return
        self._acted[step.group] = (version, self._clock.monotonic_s())
        try:
            await self._api.apply_replicas(
                deployment["metadata"]["name"],
                step.replicas,
                force=step.take_over,
                # What is taken is taken from those who were seen, and from nobody who came since.
                version=version if step.take_over else None,
            )
        except ApiProblem as error:
            self._failed(step, error)
        else:
            self._failures.pop(step.group, None)
            self._refused.pop(step.group, None)
            self._note("scale", f"scaled {step.group} to {step.replicas}: {step.reason}")

    def _may_act(self, group: str, version: str) -> bool:
        now_s = self._clock.monotonic_s()
        acted_on, acted_s = self._acted.get(group, ("", 0.0))
        if acted_on == version and now_s - acted_s < SETTLED_S:
            return False
        return self.lease.held() and now_s >= self._retry_at_s.get(group, 0.0)

    def _failed(self, step: ScaleWorkload, error: ApiProblem) -> None:
        group = step.group
        self._failures[group] += 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures[group], 8))
        if isinstance(error, ApiThrottled):
            pause_s = error.retry_after_s
        if isinstance(error, ApiConflict) and step.take_over:
            pause_s = 0.0  # it changed meanwhile: planned anew as soon as the watch tells
        elif isinstance(error, ApiConflict):
            self._refused[group] = (step.replicas, str(error))
        else:
            # Whether it was done is not known, so the same version may be acted on again.
            self._acted.pop(group, None)
        self._retry_at_s[group] = self._clock.monotonic_s() + pause_s
        self._note("fail", f"did not scale {group} to {step.replicas}: {error}")

    def _note(self, kind: str, line: str) -> None:
        self.actions[kind] += 1
        self.recent.appendleft(f"{time.strftime('%H:%M:%SZ', time.gmtime())} {line}")
        log.info("placement_action", extra={"kind": kind, "line": line})
