"""What placement needs of the machinery that runs the workers: this node's processes, or a cluster."""

from __future__ import annotations

from typing import Protocol

from prometheus_client.registry import Collector

from trireme.runtime.health import Health
from trireme.wire.placement.v1 import placement_pb2_grpc as rpc


class Backend(Protocol):
    """Makes the living workers equal to the desired ones."""

    @property
    def servicer(self) -> rpc.PlacementServicer:
        """Its gRPC face."""
        ...

    @property
    def collector(self) -> Collector | None:
        """What it counts; None: nothing."""
        ...

    def health(self) -> Health:
        """Whether it makes progress, and what holds it up."""
        ...

    async def run(self) -> None:
        """Reconcile for ever."""
        ...

    async def stop(self) -> None:
        """Leave in order, after `run` was cancelled by a stop that was asked for."""
        ...
