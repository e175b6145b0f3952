"""The gRPC face of the placement service: decode, decide, encode."""

from __future__ import annotations

from typing import Any

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.errors import InvalidRequest, ServiceUnavailable, TriremeError
from trireme.placement.desired import DesiredFleet
from trireme.placement.process_table import WorkerProcess
from trireme.placement.reconciler import Reconciler
from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.clock import Clock
from trireme.runtime.serving import Context
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1 import placement_pb2 as pb
from trireme.wire.placement.v1 import placement_pb2_grpc as rpc


class PlacementServicer(rpc.PlacementServicer):
    """Where placement supervises the workers of its node."""

    def __init__(self, desired: DesiredFleet, reconciler: Reconciler, clock: Clock) -> None:
        self._desired = desired
        self._reconciler = reconciler
        self._clock = clock

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        table = self._reconciler.table
        now_s = self._clock.monotonic_s()
        workers = [self._living(process) for process in table.living]
        filled = {(process.group, process.index) for process in table.living}
        wanted = {
            (target.group, index) for target in self._desired.targets() for index in range(target.replicas)
        }
        for slot in sorted(wanted - filled):
            history = table.histories.get(slot)
            if history is not None:
                worker = pb.WorkerProcess(group=slot[0], index=slot[1], phase=pb.WORKER_PHASE_WAITING)
                worker.restart_in_s = max(0.0, history.not_before_s - now_s)
                workers.append(worker)
        for worker in workers:
            slot = (worker.group, worker.index)
            history = table.histories.get(slot)
            worker.last_exit = table.last_exits.get(slot, "")
            if history is not None:
                worker.restarts = history.restarts
                worker.crash_looping = history.is_crash_looping
        workers.sort(key=lambda worker: (worker.group, worker.index, worker.pid))
        return pb.GetStateResponse(
            groups=[
                pb.GroupState(
                    group=target.group,
                    desired_replicas=target.replicas,
                    ready_replicas=sum(
                        p.ready and p.draining_at_s is None for p in table.living if p.group == target.group
                    ),
                    desired_variants=target.variants,
                    overridden=self._desired.is_overridden(target.group),
                )
                for target in self._desired.targets()
            ],
            workers=workers,
            actions=self._reconciler.actions,
            recent=self._reconciler.recent,
            supervises=True,
        )

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        before = await self._desired.scale(request.group, request.replicas)
        self._reconciler.wake()
        return pb.ScaleResponse(previous_replicas=before)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        process = self._process(request.worker_id)
        if process.draining_at_s is None:
            await self._reconciler.drain(process, "asked for")
            self._reconciler.wake()
        return pb.DrainResponse()

    async def LoadVariant(self, request: pb.LoadVariantRequest, context: Context) -> pb.LoadVariantResponse:
        await self._change(request, load=True)
        return pb.LoadVariantResponse()

    async def UnloadVariant(
        self, request: pb.UnloadVariantRequest, context: Context
    ) -> pb.UnloadVariantResponse:
        await self._change(request, load=False)
        return pb.UnloadVariantResponse()

    async def _change(self, request: pb.LoadVariantRequest | pb.UnloadVariantRequest, *, load: bool) -> None:
        if request.WhichOneof("target") == "worker_id":
            process = self._process(request.worker_id)
            await self._desired.change_worker_variant(
                request.worker_id, process.group, request.variant, load=load
            )
        else:
            await self._desired.change_group_variant(request.group, request.variant, load=load)
        self._reconciler.wake()

    def _process(self, worker_id: str) -> WorkerProcess:
        process = self._reconciler.table.by_worker_id(worker_id) if worker_id else None
        if process is None:
            raise InvalidRequest(
                f"no worker {worker_id!r} lives on this node: `trireme status` names them", param="worker_id"
            )
        return process

    def _living(self, process: WorkerProcess) -> pb.WorkerProcess:
        return pb.WorkerProcess(
            group=process.group,
            index=process.index,
            pid=process.identity.pid,
            worker_id=process.worker_id,
            phase=_phase(process),
            started_unix_s=process.identity.started_unix_s,
            variants=process.variants,
            adopted=process.child is None,
            load_error=process.load_error,
        )


class ObservingServicer(rpc.PlacementServicer):
    """Where someone else starts the workers: it shows the registry and passes control calls on."""

    def __init__(self, registry: Registry, loader: VariantLoader, *, drain_timeout_s: float) -> None:
        self._registry = registry
        self._loader = loader
        self._drain_timeout_s = drain_timeout_s

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        workers = []
        for record in await self._living():
            phase = pb.WORKER_PHASE_READY if record.healthy else pb.WORKER_PHASE_UNREADY
            workers.append(
                pb.WorkerProcess(
                    pid=record.pid,
                    worker_id=record.id,
                    phase=pb.WORKER_PHASE_DRAINING if record.worker.draining else phase,
                    started_unix_s=record.started_unix_s,
                    variants=[variant.variant for variant in record.worker.variants],
                )
            )
        return pb.GetStateResponse(workers=workers, supervises=False)

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        raise InvalidRequest("workers are not started by placement here: scale their Deployment")

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        address = await self._address(request.worker_id)
        await self._passed_on(self._loader.drain(address, timeout_s=self._drain_timeout_s))
        return pb.DrainResponse()

    async def LoadVariant(self, request: pb.LoadVariantRequest, context: Context) -> pb.LoadVariantResponse:
        await self._passed_on(self._loader.load(await self._address(request.worker_id), request.variant))
        return pb.LoadVariantResponse()

    async def UnloadVariant(
        self, request: pb.UnloadVariantRequest, context: Context
    ) -> pb.UnloadVariantResponse:
        await self._passed_on(self._loader.unload(await self._address(request.worker_id), request.variant))
        return pb.UnloadVariantResponse()

    async def _passed_on(self, call: Any) -> None:
        try:
            await call
        except TriremeError:
            raise
        except self._loader.failures as error:
            raise ServiceUnavailable(f"the worker answered {self._loader.explain(error)}") from error

    async def _living(self) -> list[ProcessRecord]:
        try:
            return await self._registry.living("worker")
        except AWAY as error:
            raise ServiceUnavailable("the bus is away: try again") from error

    async def _address(self, worker_id: str) -> str:
        for record in await self._living():
            if record.id == worker_id:
                return record.grpc_address
        raise InvalidRequest(f"no worker {worker_id!r} lives; name one of GetState's", param="worker_id")


def _phase(process: WorkerProcess) -> pb.WorkerPhase.ValueType:
    if process.draining_at_s is not None:
        return pb.WORKER_PHASE_DRAINING
    if process.lease_lost_at_s is not None:
        return pb.WORKER_PHASE_LOST
    if process.record is None:
        return pb.WORKER_PHASE_STARTING
    return pb.WORKER_PHASE_READY if process.ready else pb.WORKER_PHASE_UNREADY
