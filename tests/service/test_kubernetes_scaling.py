"""Placement on Kubernetes: the real client, over TCP, against a server that speaks the API's protocol."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import free_port
from tests.service.stand_ins.kubernetes_api import ApiServer, Call, Cluster, Json, Status, api_server, storm
from trireme.placement.kubernetes_api import (
    FIELD_MANAGER,
    ApiAway,
    ApiConflict,
    ApiThrottled,
    KubernetesApi,
    open_kubernetes,
)
from trireme.placement.kubernetes_lease import LeaderLease
from trireme.placement.kubernetes_scaler import KubernetesScaler
from trireme.placement.replica_wishes import ReplicaWishes
from trireme.policies.placement import GroupTarget
from trireme.runtime.clock import SystemClock
from trireme.runtime.shutdown import end_tasks

RELEASE = "app.kubernetes.io/name=trireme,app.kubernetes.io/instance=blue"


def labels(group: str, *, scaled_by: str = "placement", release: str = "blue") -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "trireme",
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/component": f"worker-{group}",
        "trireme/service": "worker",
        "trireme/scaled-by": scaled_by,
    }


class Wishes:
    """What is wanted, said by the test."""

    def __init__(self, **replicas: int) -> None:
        self.replicas = replicas

    async def refresh(self) -> None:
        return None

    def targets(self) -> list[GroupTarget]:
        return [GroupTarget(group=g, replicas=n, variants=()) for g, n in self.replicas.items()]


class HandClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s


@asynccontextmanager
async def connected(
    server: ApiServer, tmp_path: Path, clock: SystemClock | HandClock | None = None
) -> AsyncIterator[KubernetesApi]:
    config = server.kubeconfig(tmp_path / "kubeconfig")
    async with open_kubernetes(config, "serving", clock or SystemClock()) as api:
        yield api


@asynccontextmanager
async def scaling(
    api: KubernetesApi, wishes: Wishes, *, identity: str = "one", stale_s: float = 30.0
) -> AsyncIterator[KubernetesScaler]:
    clock = SystemClock()
    scaler = KubernetesScaler(
        api,
        cast(ReplicaWishes, wishes),
        LeaderLease(api, "placement", identity, duration_s=3, clock=clock),
        clock,
        release_selector=RELEASE,
        yielding=frozenset({"helm", FIELD_MANAGER}),
        period_s=0.05,
        watch_s=2,
        stale_s=stale_s,
    )
    running = asyncio.create_task(scaler.run())
    try:
        yield scaler
        assert not running.done(), running.result()
    finally:
        await end_tasks([running])


async def eventually(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cluster = Cluster()
    cluster.install("blue-worker-cpu", labels("cpu"))
    async with api_server(cluster, free_port()) as found:
        yield found


def scale_calls(server: ApiServer) -> list[Call]:
    return [call for call in server.calls if call.resource == "deployments/scale"]


async def test_it_takes_the_number_that_the_installer_left_and_owns_it_alone(
    server: ApiServer, tmp_path: Path
) -> None:
    server.cluster.install("green-worker-cpu", labels("cpu", release="green"), replicas=9)
    wishes = Wishes(cpu=3)
    async with connected(server, tmp_path) as api, scaling(api, wishes) as scaler:
        await eventually(lambda: len(scaler.pods()) == 3, "three pods are seen")
        assert server.cluster.owners("blue-worker-cpu") == [(FIELD_MANAGER, "Apply", "scale")]
        await eventually(lambda: scaler.health().status == "ok", "nothing holds it up")
        wishes.replicas["cpu"] = 0
        await eventually(lambda: server.cluster.replicas("blue-worker-cpu") == 0, "none wanted")
        first, *_, last = scale_calls(server)
        assert (first.query["force"], last.query["force"]) == ("true", "false")
    assert server.cluster.replicas("green-worker-cpu") == 9


async def test_a_number_that_is_as_wanted_is_held_without_force(server: ApiServer, tmp_path: Path) -> None:
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=1)):
        await eventually(lambda: len(server.cluster.owners("blue-worker-cpu")) == 2, "it is shared")
        assert {call.query["force"] for call in scale_calls(server)} == {"false"}


async def test_what_an_autoscaler_sets_is_left_alone_and_told(server: ApiServer, tmp_path: Path) -> None:
    wishes = Wishes(cpu=2)
    async with connected(server, tmp_path) as api, scaling(api, wishes) as scaler:
        await eventually(lambda: server.cluster.replicas("blue-worker-cpu") == 2, "ours at first")
        server.cluster.update_replicas("blue-worker-cpu", 7, manager="kube-controller-manager")
        server.changed()
        await eventually(lambda: "cpu" in scaler.left, "the conflict is told")
        assert "kube-controller-manager" in scaler.left["cpu"]
        before = len(scale_calls(server))
        wishes.replicas["cpu"] = 4
        await eventually(lambda: "4 are wanted" in scaler.left["cpu"], "the other number is told")
        assert server.cluster.replicas("blue-worker-cpu") == 7
        assert len(scale_calls(server)) == before


async def test_an_owner_that_nobody_saw_coming_is_not_overruled(server: ApiServer, tmp_path: Path) -> None:
    # The autoscaler acts between the look and the call, each time.
    rushed = []

    def overtake(call: Call) -> None:
        if call.resource == "deployments/scale" and not rushed:
            rushed.append(call)
            server.cluster.update_replicas("blue-worker-cpu", 5, manager="kube-controller-manager")

    server.fault = overtake
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=2)) as scaler:
        await eventually(lambda: bool(rushed), "it tries")
        server.changed()
        await eventually(lambda: "cpu" in scaler.left, "the conflict is told")
        assert server.cluster.replicas("blue-worker-cpu") == 5
        assert scaler.actions["scale"] == 0


async def test_without_field_management_to_see_the_servers_refusal_is_told(
    server: ApiServer, tmp_path: Path
) -> None:
    server.cluster.update_replicas("blue-worker-cpu", 7, manager="keda-operator")
    hidden = server.cluster.objects["deployments", "blue-worker-cpu"]["metadata"]
    find = server.cluster.find

    def without_fields(resource: str, selector: str) -> list[Json]:
        return [
            {**each, "metadata": {k: v for k, v in each["metadata"].items() if k != "managedFields"}}
            for each in find(resource, selector)
        ]

    server.cluster.find = without_fields  # type: ignore[method-assign]
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=2)) as scaler:
        await eventually(lambda: "cpu" in scaler.left, "the refusal is told")
        assert 'conflict with "keda-operator" with subresource "scale"' in scaler.left["cpu"]
        assert server.cluster.replicas("blue-worker-cpu") == 7
    assert hidden["managedFields"]


async def test_a_workload_that_others_scale_is_shown_and_not_touched(
    server: ApiServer, tmp_path: Path
) -> None:
    server.cluster.install("blue-worker-gpu", labels("gpu", scaled_by="hpa"), replicas=4)
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=2, gpu=1)) as scaler:
        await eventually(lambda: server.cluster.replicas("blue-worker-cpu") == 2, "ours is scaled")
        assert {t.group: t.replicas for t in scaler.targets()} == {"cpu": 2, "gpu": 4}
        assert not scaler.left
        assert {call.name for call in scale_calls(server)} == {"blue-worker-cpu"}


async def test_an_old_version_is_listed_anew_and_nothing_is_missed(server: ApiServer, tmp_path: Path) -> None:
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=2)) as scaler:
        await eventually(lambda: len(scaler.pods()) == 2, "in touch")
        lists = scaler.pod_mirror.counts["list"]
        server.cluster.remove("pods", next(iter(scaler.pod_mirror.objects)))
        server.cluster.forget()  # the watch's place is gone, and the change with it
        server.changed()
        await eventually(lambda: len(scaler.pods()) == 1, "the lost change is seen")
        assert scaler.pod_mirror.counts["list"] > lists
        assert scaler.pod_mirror.counts["ApiExpired"] >= 1


async def test_bookmarks_carry_a_watch_over_changes_of_others(server: ApiServer, tmp_path: Path) -> None:
    async with connected(server, tmp_path) as api, scaling(api, Wishes(cpu=1)) as scaler:
        await eventually(lambda: len(server.cluster.owners("blue-worker-cpu")) == 2, "in touch")
        await eventually(lambda: len(scaler.pods()) == 1, "nothing of ours will change")
        server.cluster.install("green-worker-cpu", labels("cpu", release="green"), replicas=50)
        server.changed()
        watches = scaler.pod_mirror.counts["watch"]
        seen = server.cluster.version
        await eventually(
            lambda: any(
                (call.verb, call.resource) == ("watch", "pods") and int(call.query["resourceVersion"]) >= seen
                for call in server.calls
            ),
            "the next watch begins behind them",
        )
        assert scaler.pod_mirror.counts["watch"] > watches
        assert scaler.pod_mirror.counts["list"] == 1


async def test_long_lists_come_in_pages(server: ApiServer, tmp_path: Path) -> None:
    server.cluster.install("blue-worker-many", labels("many"), replicas=1201)
    async with connected(server, tmp_path) as api:
        found, version = await api.list_pods(f"{RELEASE},trireme/service=worker")
    assert len(found) == 1202 and int(version) == server.cluster.version
    assert [call.query.get("continue") for call in server.calls] == [None, "500", "1000"]


async def test_retry_after_is_waited_for_by_every_call(server: ApiServer, tmp_path: Path) -> None:
    clock = HandClock()
    server.fault = lambda call: "throttle 7"
    async with connected(server, tmp_path, clock) as api:
        with pytest.raises(ApiThrottled):
            await api.apply_replicas("blue-worker-cpu", 2, force=False)
        server.fault = lambda call: None
        clock.now_s += 6.9
        for call in (api.list_pods(RELEASE), api.read_lease("x"), api.list_deployments(RELEASE)):
            with pytest.raises(ApiThrottled) as throttled:
                await call
            assert throttled.value.retry_after_s == pytest.approx(0.1)
        assert len(server.calls) == 1, "nothing was sent meanwhile"
        clock.now_s += 0.2
        await api.list_pods(RELEASE)


@pytest.mark.parametrize("trouble", ["abort", "garbage", Status(500, "InternalError", "x")], ids=str)
async def test_what_the_server_does_wrong_is_its_absence(
    server: ApiServer, tmp_path: Path, trouble: Status | str
) -> None:
    server.fault = lambda call: trouble
    async with connected(server, tmp_path) as api:
        with pytest.raises(ApiAway):
            await api.list_deployments(RELEASE)


async def test_while_the_server_is_away_the_last_picture_stays_and_nothing_is_decided(
    server: ApiServer, tmp_path: Path
) -> None:
    wishes = Wishes(cpu=2)
    async with connected(server, tmp_path) as api, scaling(api, wishes, stale_s=4.0) as scaler:
        await eventually(lambda: len(scaler.pods()) == 2, "in touch")
        await server.stop()
        await eventually(lambda: scaler.health().status.startswith("degraded"), "it says so")
        assert scaler.health().healthy, "it answers: what it shows is the last picture"
        wishes.replicas["cpu"] = 5
        await eventually(lambda: "nothing is decided" in scaler.health().status, "too old to decide")
        assert len(scaler.pods()) == 2
        calls = len(scale_calls(server))
        await server.start()
        await eventually(lambda: server.cluster.replicas("blue-worker-cpu") == 5, "made good")
        assert len(scale_calls(server)) > calls
        await eventually(lambda: scaler.health().status == "ok", "well again")


async def test_what_was_confirmed_too_long_ago_decides_nothing_though_calls_would_work(
    server: ApiServer, tmp_path: Path
) -> None:
    # Lists and watches fail; patches and Leases work.
    wishes = Wishes(cpu=2)
    async with connected(server, tmp_path) as api, scaling(api, wishes, stale_s=3.0) as scaler:
        await eventually(lambda: len(scaler.pods()) == 2, "in touch")
        server.fault = lambda call: (
            Status(500, "InternalError", "x") if call.verb in ("list", "watch", "watching") else None
        )
        await eventually(lambda: "nothing is decided" in scaler.health().status, "too old")
        wishes.replicas["cpu"] = 3
        looks = len([call for call in server.calls if call.resource == "leases"])
        await eventually(
            lambda: len([c for c in server.calls if c.resource == "leases"]) > looks + 4, "time passes"
        )
        await eventually(scaler.lease.held, "it leads")
        assert server.cluster.replicas("blue-worker-cpu") == 2
        server.fault = lambda call: None
        await eventually(lambda: server.cluster.replicas("blue-worker-cpu") == 3, "made good")


async def test_never_do_two_hold_the_lease_and_one_does_in_the_end(server: ApiServer, tmp_path: Path) -> None:
    rng = random.Random(5)
    clock = HandClock()
    async with AsyncExitStack() as stack:
        leases = []
        for who in ("a", "b", "c"):
            api = await stack.enter_async_context(connected(server, tmp_path, clock))
            leases.append(LeaderLease(api, "placement", who, duration_s=15, clock=clock))
        holders = set()
        for turn in range(300):
            server.fault = storm(rng, 0.3 if turn < 280 else 0.0)
            # One that is slow or paused takes no part for a while, and returns.
            await rng.choice(leases if turn < 150 else leases[1:]).step()
            clock.now_s += rng.choice([0.0, 0.5, 2.0, 6.0])
            held = [lease for lease in leases if lease.held()]
            assert len(held) <= 1
            holders |= {id(lease) for lease in held}
        assert len(holders) > 1, "it changed hands"
        (last,) = {lease.holder for lease in leases[1:]}
        assert last in ("b", "c")


async def test_a_holder_that_leaves_in_order_is_followed_at_once(server: ApiServer, tmp_path: Path) -> None:
    clock = HandClock()
    async with connected(server, tmp_path, clock) as api:
        first, second = (LeaderLease(api, "placement", who, duration_s=15, clock=clock) for who in "ab")
        await first.step()
        await second.step()
        assert first.held() and not second.held() and second.holder == "a"
        await first.release()
        await second.step()
        assert second.held() and not first.held()
        spec = server.cluster.get("leases", "placement")["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 2)


async def test_a_late_answer_to_a_renewal_is_no_leadership(server: ApiServer, tmp_path: Path) -> None:
    clock = HandClock()

    def slow(call: Call) -> None:
        if call.verb == "patch":
            clock.now_s += 10.1  # of 15 s, two thirds are for acting

    server.fault = slow
    async with connected(server, tmp_path, clock) as api:
        lease = LeaderLease(api, "placement", "a", duration_s=15, clock=clock)
        await lease.step()
        assert lease.holder == "a" and not lease.held()


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_the_wanted_number_is_there_in_the_end(
    server: ApiServer, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    cluster = server.cluster
    cluster.install("blue-worker-gpu", labels("gpu"), replicas=2, manager="helm")
    cluster.install("blue-worker-theirs", labels("theirs", scaled_by="keda"), replicas=3)
    wishes = Wishes(cpu=1, gpu=1, theirs=1)
    async with AsyncExitStack() as stack:
        scalers = []
        for identity in ("one", "two"):
            api = await stack.enter_async_context(connected(server, tmp_path))
            scalers.append(await stack.enter_async_context(scaling(api, wishes, identity=identity)))
        for _ in range(25):
            match rng.randrange(6):
                case 0 | 1:
                    wishes.replicas[rng.choice(["cpu", "gpu"])] = rng.randrange(0, 6)
                case 2:
                    server.fault = storm(rng, rng.choice([0.2, 0.6, 1.0]))
                case 3:
                    cluster.forget()
                    server.changed()
                case 4:
                    await server.stop()
                    await asyncio.sleep(rng.uniform(0.0, 0.1))
                    await server.start()
                case 5:
                    server.fault = lambda call: None
            await asyncio.sleep(rng.uniform(0.0, 0.1))
        server.fault = lambda call: None
        for name in ("cpu", "gpu"):
            await eventually(
                lambda n=name: cluster.replicas(f"blue-worker-{n}") == wishes.replicas[n],  # type: ignore[misc]
                f"{name} is as wanted",
            )
        for scaler in scalers:
            await eventually(
                lambda s=scaler: (
                    {t.group: t.replicas for t in s.targets()} == wishes.replicas | {"theirs": 3}
                ),  # type: ignore[misc]
                "both see it",
            )
        assert cluster.replicas("blue-worker-theirs") == 3
        assert FIELD_MANAGER not in [manager for manager, _, _ in cluster.owners("blue-worker-theirs")]


class HardOfHearing(Wishes):
    """Its look at Redis loses the first cancellation, as the Redis client's may in Python 3.11."""

    heard = 0

    async def refresh(self) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.heard += 1
            if self.heard > 1:
                raise


async def test_it_stops_though_a_cancellation_is_lost(server: ApiServer, tmp_path: Path) -> None:
    wishes = HardOfHearing(cpu=1)
    async with asyncio.timeout(60):
        async with connected(server, tmp_path) as api, scaling(api, wishes):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    assert wishes.heard


async def test_a_conflict_names_the_owner(server: ApiServer, tmp_path: Path) -> None:
    async with connected(server, tmp_path) as api:
        with pytest.raises(ApiConflict, match=r'conflict with "helm" using apps/v1: .spec.replicas'):
            await api.apply_replicas("blue-worker-cpu", 2, force=False)
