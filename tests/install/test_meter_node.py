"""One node's meters may serve workers of several KV stores: a worker says which node meters it."""

from __future__ import annotations

from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.power.metering import WorkerNodes
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord


async def test_a_worker_belongs_to_the_power_service_that_it_names(redis_url: str) -> None:
    async with open_redis(redis_url) as redis:
        registry = Registry(redis, Keys("fleet"))
        for name, node, meter_node in (
            ("pod-of-this-machine", "pod-1", "machine-1"),
            ("pod-of-another", "pod-2", "machine-2"),
            ("says-nothing", "machine-1", ""),
        ):
            record = ProcessRecord(id=name, service="worker", node=node, meter_node=meter_node)
            await registry.put(record)
        here = WorkerNodes(registry, "machine-1")
        await here.learn({"pod-of-this-machine", "pod-of-another", "says-nothing"})
    assert here.is_here("pod-of-this-machine")
    assert not here.is_here("pod-of-another")
    assert here.is_here("says-nothing")
