"""The power service as a process: facts in, tariff out, and books that sum to the meter across kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.service.processes import service, wait_until
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.policies.energy_billing import tariff_for
from trireme.wire.bus.v1.facts_pb2 import (
    Directive,
    EngineWindow,
    Event,
    Measurement,
    ProcessRecord,
    RequestFinished,
)
from trireme.wire.inference.v1.inference_pb2 import Usage
from trireme.wire.power.v1 import power_pb2 as pb
from trireme.wire.power.v1.power_pb2_grpc import PowerStub

KEYS = Keys("trireme")
GPU_W = 150.0
"""The modelled GPU's constant draw: an independent reading of it is watts times seconds."""
GROUP = "power:local"
WORK_S = 0.1
"""Engine time of one fact."""


class Bench:
    """Looks at the service from outside, and plays a worker."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.registry = Registry(redis, KEYS)
        self.measurements = Stream(redis, KEYS.measurements, Measurement)
        self.directives = Stream(redis, KEYS.directives, Directive)
        self.events = Stream(redis, KEYS.events, Event)
        self.sent = 0
        self.newest = b"0-0"

    async def record(self) -> ProcessRecord:
        """The living power service, waiting for it; the record of a killed one outlives it by its lease."""
        found: list[ProcessRecord] = []

        async def there() -> bool:
            found[:] = [one for one in await self.registry.living("power") if _runs(one.pid)]
            return len(found) == 1

        await until(there, what="power service in the registry")
        return found[0]

    async def watching(self) -> None:
        """Wait until the ledger covers more time than the facts of `work` do."""
        await self.record()

        async def watches() -> bool:
            book = (await self.books())["books"].get("cuda:0")
            return book is not None and book["account"]["metered_uj"] > 4 * WORK_S * GPU_W * 1e6

        await until(watches, what="some metered time")

    async def ask(self, method: str, request: Any) -> Any:
        async with grpc.aio.insecure_channel((await self.record()).grpc_address) as channel:
            return await getattr(PowerStub(channel), method)(request, timeout=60)

    async def gpu_ledger(self) -> pb.DeviceLedger:
        answer: pb.GetLedgerResponse = await self.ask("GetLedger", pb.GetLedgerRequest())
        return next(book for book in answer.devices if book.device == "cuda:0")

    async def books(self) -> Any:
        """The durable state."""
        text = await self.redis.hget(KEYS.ledger("power:local"), "ledger")
        return json.loads(text or b'{"books": {}}')

    async def tariff(self) -> float | None:
        """What a worker on cuda:0 would bill by now."""
        newest: Any = await self.redis.xrevrange(KEYS.directives, count=1)
        if not newest:
            return None
        rates = Directive.FromString(newest[0][1][b"f"]).tariff.joules_per_engine_s
        return tariff_for(rates, node="local", device="cuda:0/mig:1")

    async def work(self, joules: float, *, fact_id: str | None = None, busy_s: float = WORK_S) -> None:
        """Say that `WORK_S` of engine time, just over, was billed `joules`."""
        self.sent += 1
        window = EngineWindow(
            worker_id="worker-1",
            device="cuda:0",
            busy_s=busy_s,
            billed_engine_s=WORK_S,
            billed_joules=joules,
        )
        name = fact_id or f"fact-{self.sent}"
        await self.measurements.publish(
            Measurement(id=name, at_unix_s=time.time(), window_s=WORK_S, engine=window)
        )
        self.newest = await self.measurements.last_id()

    async def idle_group(self) -> bool:
        """Whether what was sent is read and acknowledged; the service's own windows come after it."""
        [group] = await self.redis.xinfo_groups(KEYS.measurements)
        held = await self.redis.xpending_range(
            KEYS.measurements, group["name"], min="-", max=self.newest, count=1
        )
        return not held and _place(group["last-delivered-id"]) >= _place(self.newest)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _place(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


async def until(condition: Callable[[], Awaitable[bool]], *, what: str, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what} within {within_s} s")
        await asyncio.sleep(0.05)


def assert_sums(ledger: pb.DeviceLedger) -> None:
    for accounts in (ledger.total, ledger.last_hour):
        parts = accounts.billed_joules + accounts.idle_joules + accounts.unattributed_joules
        assert accounts.metered_joules == pytest.approx(parts, abs=1e-6)
    rest = ledger.pending_joules + ledger.carry_joules + ledger.written_off_joules
    assert ledger.total.unattributed_joules == pytest.approx(rest, abs=1e-6)


async def assert_books_sum(bench: Bench) -> None:
    """The durable state, in whole microjoules."""
    for book in (await bench.books())["books"].values():
        account = book["account"]
        pending_uj = sum(w["energy_uj"] - w["billed_uj"] for w in account["windows"])
        rest_uj = pending_uj + account["carry_uj"] + account["written_off_uj"]
        assert account["metered_uj"] == account["billed_uj"] + account["idle_uj"] + rest_uj


def power(redis_url: str, log: Path) -> Any:
    return service("power", log / "power.log", redis_url=redis_url, modelled_gpu_w=f"{GPU_W}", window_s=0.1)


async def test_facts_come_in_a_tariff_goes_out_and_the_ledger_sums_to_the_meter(
    redis_url: str, tmp_path: Path
) -> None:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        with power(redis_url, tmp_path) as process:
            await bench.record()

            async def priced() -> bool:
                return await bench.tariff() == pytest.approx(GPU_W, rel=0.01)

            # Nothing is known yet but the draw: an engine second costs what the GPU draws in it.
            await until(priced, what="a first tariff")
            # A worker that bills twice the draw is answered with a lower price.
            await bench.watching()
            for _ in range(4):
                await bench.work(2 * WORK_S * GPU_W)
                await asyncio.sleep(WORK_S)

            async def cheaper() -> bool:
                return (await bench.tariff() or 0.0) < 0.9 * GPU_W

            await until(cheaper, what="a lower tariff")
            await until(bench.idle_group, what="all facts acknowledged")
            ledger = await bench.gpu_ledger()
            assert_sums(ledger)
            await assert_books_sum(bench)
            assert (ledger.meter, ledger.total.billed_joules) == ("nvml", 4 * 2 * WORK_S * GPU_W)

            async def draws_as_it_should() -> bool:
                # Of a window of 0.1 s; on a busy machine some are measured badly.
                status = await bench.ask("GetStatus", pb.GetStatusRequest())
                gpu = next(meter for meter in status.meters if meter.device == "cuda:0")
                return bool(gpu.draw_w == pytest.approx(GPU_W, rel=0.05))

            await until(draws_as_it_should, what="the GPU's draw")
            status = await bench.ask("GetStatus", pb.GetStatusRequest())
            assert (status.carbon.source, status.carbon.grams_co2e_per_kwh) == ("static", 436.0)
            windows = (await bench.books())["books"]["cuda:0"]["account"]["windows"]
            seconds = windows[-1]["end_s"] - ledger.since_unix_s
            ledger = await bench.gpu_ledger()
            assert ledger.total.metered_joules >= GPU_W * (seconds - 0.5)
            assert ledger.total.metered_grams_co2e == pytest.approx(
                ledger.total.metered_joules / 3.6e6 * 436.0
            )
            address = (await bench.record()).http_address
            page = await asyncio.to_thread(
                lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()
            )
            for name in (
                'trireme_energy_joules_total{account="billed",device="cuda:0"}',
                'trireme_energy_unattributed_joules{device="cuda:0",part="carry"}',
                'trireme_power_draw_watts{device="cpu",meter="cpu-model"}',
                'trireme_carbon_intensity_grams_per_kwh{fallback="false",source="static"} 436.0',
            ):
                assert name in page
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 60)
            assert process.returncode == 0
        assert await bench.registry.living("power") == []


async def test_duplicates_count_once_nonsense_not_at_all_and_requests_can_be_asked_for(
    redis_url: str, tmp_path: Path
) -> None:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        usage = Usage(prompt_tokens=150, completion_tokens=50, engine_s=0.5, joules=4.0, grams_co2e=0.001)
        finished = RequestFinished(request_id="r1", variant="small", usage=usage)
        await bench.events.publish(Event(id="e1", finished=finished))
        with power(redis_url, tmp_path):
            await bench.watching()
            for _ in range(3):
                await bench.work(5.0, fact_id="same")
            await bench.work(-7.0)
            await bench.work(5.0, busy_s=float("nan"))
            await bench.redis.xadd(KEYS.measurements, {b"f": b""})  # an empty measurement is no engine's

            async def taken() -> bool:
                return bool((await bench.books()).get("refused_facts") == 2)

            await until(taken, what="facts taken in")
            answer = await bench.ask("GetLedger", pb.GetLedgerRequest())
            assert (answer.duplicate_facts, answer.refused_facts) == (2, 2)
            assert (await bench.gpu_ledger()).total.billed_joules == 5.0

            energy = await bench.ask("GetRequestEnergy", pb.GetRequestEnergyRequest(request_id="r1"))
            assert (energy.joules, energy.joules_per_1k_tokens) == (4.0, 20.0)
            for request_id, code in (
                ("r2", grpc.StatusCode.NOT_FOUND),
                ("", grpc.StatusCode.INVALID_ARGUMENT),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await bench.ask("GetRequestEnergy", pb.GetRequestEnergyRequest(request_id=request_id))
                assert caught.value.code() == code


async def test_the_books_sum_across_kill_9_and_lose_no_fact(redis_url: str, tmp_path: Path) -> None:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        with power(redis_url, tmp_path) as process:
            await bench.watching()
            for index in range(20):
                await bench.work(10.0)
                await asyncio.sleep(0.03)
                if index == 10:
                    process.kill()
            process.wait()
        before = (await bench.books())["books"]["cuda:0"]["account"]
        await assert_books_sum(bench)

        # The dead process had read one more fact and said nothing of it.
        await bench.work(10.0)
        await bench.measurements.read_group(GROUP, "ledger", count=100, block_ms=None)
        with power(redis_url, tmp_path):
            await until(bench.idle_group, what="all facts acknowledged")
            ledger = await bench.gpu_ledger()
            assert_sums(ledger)
            await assert_books_sum(bench)
            assert ledger.since_unix_s == before["since_s"]
            assert ledger.total.billed_joules == 21 * 10.0, "each fact once"
            assert ledger.unmetered_billed_joules == 0.0
            # The GPU's counter went on while nobody watched: the meter's account is gapless.
            assert ledger.unmetered_s == 0.0
            account = (await bench.books())["books"]["cuda:0"]["account"]
            watched_s = account["windows"][-1]["end_s"] - account["watched_since_s"]
            assert account["metered_uj"] / 1e6 == pytest.approx(GPU_W * watched_s, rel=0.02, abs=0.25 * GPU_W)


async def test_a_second_service_takes_the_ledger_over_and_the_first_one_leaves(
    redis_url: str, tmp_path: Path
) -> None:
    async with open_redis(redis_url) as redis:
        bench = Bench(redis)
        with power(redis_url, tmp_path) as first:
            await bench.watching()
            with power(redis_url, tmp_path) as second:
                await asyncio.to_thread(wait_until, lambda: first.poll() is not None, what="first leaves")
                await bench.work(3.0)
                await until(bench.idle_group, what="all facts acknowledged")
                assert second.poll() is None
                await assert_books_sum(bench)
                books = await bench.books()
                assert books["books"]["cuda:0"]["account"]["billed_uj"] == 3_000_000
