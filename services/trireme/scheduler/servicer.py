"""The gRPC face of the scheduler: why a request went where it went, and what waits."""

from __future__ import annotations

from trireme.bus.request_records import SCHEDULERS, RequestRecords
from trireme.bus.streams import Stream
from trireme.errors import InvalidRequest, RequestNotFound
from trireme.runtime.serving import Context
from trireme.scheduler.dispatcher import Dispatcher
from trireme.scheduler.tenant_shares import TenantShares
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.scheduler.v1 import scheduler_pb2 as pb
from trireme.wire.scheduler.v1 import scheduler_pb2_grpc as rpc


class SchedulerServicer(rpc.SchedulerServicer):
    """Answers from the bus and from this replica's window."""

    def __init__(
        self,
        *,
        records: RequestRecords,
        requests: Stream[AdmittedRequest],
        dispatcher: Dispatcher,
        shares: TenantShares,
    ) -> None:
        self._records = records
        self._requests = requests
        self._dispatcher = dispatcher
        self._shares = shares

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        if not request.request_id:
            raise InvalidRequest("request_id is empty: name a request", param="request_id")
        decisions = await self._records.decisions(request.request_id)
        if not decisions:
            raise RequestNotFound(
                f"no decision about {request.request_id!r} is kept: it waits still, or ended long ago",
                param="request_id",
            )
        return pb.ExplainResponse(decisions=decisions)

    async def GetQueue(self, request: pb.GetQueueRequest, context: Context) -> pb.GetQueueResponse:
        waiting = self._dispatcher.waiting_by_tenant()
        counters = self._shares.counters
        tenants = [
            pb.TenantQueue(tenant=name, waiting=waiting.get(name, 0), virtual_tokens=counters.get(name, 0.0))
            for name in sorted(set(waiting) | set(counters))
        ]
        return pb.GetQueueResponse(
            waiting=sum(waiting.values()),
            oldest_s=self._dispatcher.oldest_s(),
            tenants=tenants,
            unread=await self._requests.unread(SCHEDULERS),
        )
