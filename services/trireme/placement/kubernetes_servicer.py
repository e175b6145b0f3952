"""The gRPC face of placement where a cluster runs the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.errors import InvalidRequest, RequestConflict
from trireme.placement.kubernetes_objects import WorkerPod
from trireme.placement.kubernetes_scaler import KubernetesScaler
from trireme.placement.servicer import ObservingServicer
from trireme.placement.variant_loader import VariantLoader
from trireme.policies.workload_scaling import PLACEMENT
from trireme.runtime.serving import Context
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb

REGISTRY_TIMEOUT_S = 1.0


class KubernetesServicer(ObservingServicer):
    """Scale is a wish for the leader to carry out; calls for one worker are passed on to it."""

    def __init__(
        self, scaler: KubernetesScaler, registry: Registry, loader: VariantLoader, *, drain_timeout_s: float
    ) -> None:
        super().__init__(registry, loader, drain_timeout_s=drain_timeout_s)
        self._scaler = scaler

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        scaler = self._scaler
        try:
            async with asyncio.timeout(REGISTRY_TIMEOUT_S):
                records = await self._registry.living("worker")
        except AWAY:
            records = []
        by_node = {record.node: record for record in records}
        workers = _workers(scaler.pods(), by_node)
        return pb.GetStateResponse(
            groups=[
                pb.GroupState(
                    group=target.group,
                    desired_replicas=target.replicas,
                    ready_replicas=sum(
                        w.group == target.group and w.phase == pb.WORKER_PHASE_READY for w in workers
                    ),
                    desired_variants=target.variants,
                    overridden=scaler.wishes.is_overridden(target.group),
                    left_because=scaler.left.get(target.group, ""),
                )
                for target in scaler.targets()
            ],
            workers=workers,
            actions=scaler.actions,
            recent=scaler.recent,
            supervises=True,
            status=scaler.health().status,
        )

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        workload = self._scaler.workloads().get(request.group)
        if workload is not None and workload.scaled_by != PLACEMENT:
            raise RequestConflict(
                f"{request.group} is scaled by {workload.scaled_by}: change its limits in the chart's values",
                param="group",
            )
        before = await self._scaler.wishes.scale(request.group, request.replicas)
        self._scaler.look()
        self._scaler.wake()
        return pb.ScaleResponse(previous_replicas=before)

    async def LoadVariant(self, request: pb.LoadVariantRequest, context: Context) -> pb.LoadVariantResponse:
        _refuse_groups(request)
        return await super().LoadVariant(request, context)

    async def UnloadVariant(
        self, request: pb.UnloadVariantRequest, context: Context
    ) -> pb.UnloadVariantResponse:
        _refuse_groups(request)
        return await super().UnloadVariant(request, context)


def _refuse_groups(request: pb.LoadVariantRequest | pb.UnloadVariantRequest) -> None:
    if request.WhichOneof("target") != "worker_id":
        raise InvalidRequest(
            "a group's variants come from workers[].engine.variants of the chart's values: "
            "change them there, or name one worker",
            param="group",
        )


def _workers(pods: Sequence[WorkerPod], by_node: Mapping[str, ProcessRecord]) -> list[pb.WorkerProcess]:
    """By group and age; a worker registers its pod's name as its node."""
    counted: dict[str, int] = {}
    workers = []
    for pod in sorted(pods, key=lambda pod: (pod.group, pod.created_unix_s, pod.name)):
        record = by_node.get(pod.name, ProcessRecord())
        index = counted.get(pod.group, 0)
        counted[pod.group] = index + 1
        workers.append(
            pb.WorkerProcess(
                group=pod.group,
                index=index,
                # A container's first process has this number in it.
                pid=(record.pid or 1) if pod.runs else 0,
                worker_id=record.id,
                phase=_phase(pod, record),
                started_unix_s=pod.started_unix_s,
                restarts=pod.restarts,
                last_exit=pod.last_exit,
                crash_looping=pod.crash_looping,
                variants=[variant.variant for variant in record.worker.variants],
                pod=pod.name,
            )
        )
    return workers


def _phase(pod: WorkerPod, record: ProcessRecord) -> pb.WorkerPhase.ValueType:
    if pod.terminating or record.worker.draining:
        return pb.WORKER_PHASE_DRAINING
    if not pod.runs:
        return pb.WORKER_PHASE_WAITING if pod.restarts or pod.last_exit else pb.WORKER_PHASE_STARTING
    if pod.ready:
        return pb.WORKER_PHASE_READY
    return pb.WORKER_PHASE_UNREADY if record.id else pb.WORKER_PHASE_STARTING
