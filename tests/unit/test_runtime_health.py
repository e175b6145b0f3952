"""Health follows the probes, also one that fails, and Watch hears of each change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trireme.runtime.health import Health, HealthReporter
from trireme.runtime.serving import grpc_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Probe:
    """Says what the test wants."""

    def __init__(self) -> None:
        self.now: Health | Exception = Health(healthy=True)

    def __call__(self) -> Health:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
async def stub(probe: Probe) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    reporter = HealthReporter({"a.B": probe}, period_s=0.01)
    async with (
        grpc_server("127.0.0.1:0", [], service_names=[], health=reporter, drain_s=0.1) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield health_pb2_grpc.HealthStub(channel)


async def test_watch_hears_of_each_change(probe: Probe, stub: health_pb2_grpc.HealthStub) -> None:
    for name in ("a.B", ""):
        probe.now = Health(healthy=True)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        async with asyncio.timeout(60):
            while (await watch.read()).status != SERVING:
                pass
            probe.now = Health(healthy=False, status="stuck")
            assert (await watch.read()).status == NOT_SERVING
            probe.now = Health(healthy=True)
            assert (await watch.read()).status == SERVING
        watch.cancel()


async def test_a_probe_that_fails_is_no_health_and_may_recover(
    probe: Probe, stub: health_pb2_grpc.HealthStub
) -> None:
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="a.B"))
    async with asyncio.timeout(60):
        assert (await watch.read()).status == SERVING
        probe.now = ZeroDivisionError("oops")
        assert (await watch.read()).status == NOT_SERVING
        probe.now = Health(healthy=True)
        assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_overall_names_what_is_wrong_and_a_stop_is_final(probe: Probe) -> None:
    reporter = HealthReporter({"ok": lambda: Health(healthy=True), "a.B": probe})
    assert reporter.overall() == Health(healthy=True)
    probe.now = Health(healthy=False, status="stuck")
    assert reporter.overall() == Health(healthy=False, status="stuck")
    probe.now = ValueError("oops")
    assert "oops" in reporter.overall().status
    probe.now = Health(healthy=True)
    await reporter.stop_serving()
    await reporter.refresh()
    assert reporter.overall() == Health(healthy=False, status="stopping")


async def test_list_names_all_that_can_be_asked(stub: health_pb2_grpc.HealthStub) -> None:
    listed = await stub.List(health_pb2.HealthListRequest())
    assert {name: found.status for name, found in listed.statuses.items()} == {"": SERVING, "a.B": SERVING}
