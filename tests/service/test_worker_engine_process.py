"""A worker and its engine process live and fall together, whichever of them is hurt, and how."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest

from tests.service.processes import REPOSITORY, wait_until
from tests.service.test_worker import (  # noqa: F401  (fixtures)
    KEYS,
    Bench,
    FakeGateway,
    _continued,
    bench,
    checkpoint,
)
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.wire.worker.v1 import worker_pb2_grpc as rpc
from trireme.worker.engine_client import EXIT_ENGINE_BROKEN

pytestmark = pytest.mark.timeout(600)

WITHIN_S = 60.0


def engine_of(worker_pid: int) -> psutil.Process:
    """The engine process of a worker."""
    [child] = [p for p in psutil.Process(worker_pid).children() if "engine_process" in str(p.cmdline())]
    return child


async def two_workers(bench: Bench) -> tuple[subprocess.Popen[bytes], ProcessRecord, ProcessRecord]:  # noqa: F811
    """(a worker's process, its record, the other's record), both known to the scheduler."""
    process = bench.start_worker(0)
    bench.start_worker(1)
    records = await bench.workers(2)
    await bench.until_scheduled_among(2)
    victim = next(record for record in records if record.pid == process.pid)
    survivor = next(record for record in records if record.pid != process.pid)
    return process, victim, survivor


async def under_fault(
    bench: Bench,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    victim: ProcessRecord,
    survivor: ProcessRecord,
    fault: Callable[[], None],
) -> None:
    """Eight requests over both workers; after the fault the survivor answers all, token for token."""
    prompts = {f"r{number}": [number + 1, 5, 7] for number in range(8)}
    async with FakeGateway(survivor.grpc_address) as gateway:
        for name, prompt in prompts.items():
            await bench.admit(name, prompt=prompt, max_tokens=120, ignore_eos=True)
        await gateway.until(lambda: sum(name.startswith("r") for name, _ in gateway.tokens) >= 2)
        assert await bench.redis.xlen(KEYS.assignments(victim.id)) > 0  # type: ignore[attr-defined]
        fault()
        await gateway.until(lambda: all((name, 0) in gateway.finished for name in prompts))
        for name, prompt in prompts.items():
            assert gateway.tokens[name, 0] == _continued(checkpoint, prompt, 120)


async def test_a_worker_ends_with_its_engine_and_others_take_its_requests(
    bench: Bench,  # noqa: F811
    checkpoint: Path,  # noqa: F811
) -> None:
    process, victim, survivor = await two_workers(bench)
    engine = engine_of(process.pid)
    await under_fault(bench, checkpoint, victim, survivor, engine.kill)
    wait_until(lambda: process.poll() is not None, within_s=WITHIN_S, what="the worker ends")
    assert process.returncode == EXIT_ENGINE_BROKEN
    log = [json.loads(line) for line in (bench.directory / "worker0.log").read_text().splitlines()]
    told = [line["how"] for line in log if line.get("event") == "engine_broken"]
    assert told == ["killed by SIGKILL"]


async def test_a_stopped_engine_is_found_out_by_its_progress(bench: Bench, checkpoint: Path) -> None:  # noqa: F811
    process, victim, survivor = await two_workers(bench)
    engine = engine_of(process.pid)
    stopped_s = 0.0

    def stop() -> None:
        nonlocal stopped_s
        engine.suspend()
        stopped_s = time.monotonic()

    answering = asyncio.create_task(under_fault(bench, checkpoint, victim, survivor, stop))
    while not stopped_s or victim.id in {record.id for record in await bench.registry.living("worker")}:
        assert not stopped_s or time.monotonic() - stopped_s < WITHIN_S
        await asyncio.sleep(0.1)
    await answering
    # Let run again, the worker sees that others have its requests now.
    engine.resume()
    wait_until(lambda: process.poll() is not None, within_s=WITHIN_S, what="the worker gives up")
    wait_until(lambda: not engine.is_running(), within_s=WITHIN_S, what="its engine is gone")


async def test_even_a_stopped_engine_does_not_outlive_its_worker(bench: Bench) -> None:  # noqa: F811
    process = bench.start_worker()
    [record] = await bench.workers()
    engine = engine_of(process.pid)
    async with FakeGateway(record.grpc_address) as gateway:
        await bench.admit("r", prompt=[4, 4, 4], max_tokens=400, ignore_eos=True)
        await gateway.until(lambda: ("r", 0) in gateway.tokens)
        engine.suspend()
        process.kill()
        process.wait()
        wait_until(
            lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE,
            within_s=WITHIN_S,
            what="the engine is gone",
        )


async def test_signals_to_stop_are_the_workers_business(bench: Bench) -> None:  # noqa: F811
    process = bench.start_worker()
    [record] = await bench.workers()
    engine = engine_of(process.pid)
    async with FakeGateway(record.grpc_address, confirms=True) as gateway:
        await bench.admit("r", prompt=[4, 4, 4], max_tokens=200, ignore_eos=True)
        await gateway.until(lambda: len(gateway.tokens.get(("r", 0), [])) > 2)
        engine.send_signal(signal.SIGINT)
        engine.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        await gateway.until(lambda: ("r", 0) in gateway.finished)
        assert len(gateway.tokens["r", 0]) == 200
    wait_until(lambda: process.poll() is not None, within_s=WITHIN_S, what="the worker drains")
    assert process.returncode == 0
    assert not engine.is_running()


async def test_a_variant_that_cannot_be_loaded_is_told_of_and_harms_no_other(bench: Bench) -> None:  # noqa: F811
    bench.start_worker()
    [record] = await bench.workers()
    async with grpc.aio.insecure_channel(record.grpc_address) as channel:
        load = pb.LoadVariantRequest(variant="broken", checkpoint=str(bench.directory / "nothing"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.WorkerStub(channel).LoadVariant(load)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "nothing" in (caught.value.details() or "")
    async with FakeGateway(record.grpc_address) as gateway:
        await bench.admit("r", prompt=[1, 2, 3])
        await gateway.until(lambda: ("r", 0) in gateway.finished)


def test_an_engine_whose_worker_is_gone_before_it_looks_ends_at_once() -> None:
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    words = ["-m", "trireme.worker.engine_process", "--link", "0", "--parent", "1"]
    ended = subprocess.run(
        [sys.executable, *words, "--threads", "1"],
        env=environ,
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert ended.returncode == 1 and b"the worker is gone" in ended.stderr
