"""What traces and metrics cost: throughput with both over throughput without.

    python -m benchmarks.telemetry_cost [--turns 10] [--requests 16] [--device null]

Two fleets alike but for this: one exports a trace of every request to a collector that takes it and throws
it away, counts all its metrics and has each process scraped every second; the other does none of it. They
are asked in turns, the order changes from turn to turn, and each pair of turns gives a ratio of answer
tokens per second, and one of the CPU seconds that the fleets' processes took. The goal is a throughput
ratio of at least 0.97.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import psutil

from benchmarks.fleet import MODEL, REPOSITORY, RunningFleet, fleet_document, running, write_result
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.cli.run_directory import RunDirectory
from trireme.load.drivers import grpc_driver
from trireme.load.plan import Lengths, closed
from trireme.load.report import summarise
from trireme.load.run import run_closed_loop

VOCABULARY = 4000
SCRAPE_S = 1.0
WITHOUT = REPOSITORY / "benchmarks" / "without_metrics"


class Drain(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Takes every call's bytes and answers with an empty message."""

    def __init__(self) -> None:
        self.received_bytes = 0

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._take)

    def _take(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        self.received_bytes += len(request)
        return b""


@contextmanager
def collector() -> Iterator[tuple[str, Drain]]:
    """A collector's address, and what it got."""
    drain = Drain()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    server.add_generic_rpc_handlers((drain,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", drain
    finally:
        server.stop(None)


@contextmanager
def scraped(addresses: list[str]) -> Iterator[None]:
    """Each address's /metrics is read every second while the block runs."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_S):
            for address in addresses:
                with (
                    suppress(OSError),
                    urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page,
                ):
                    page.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def http_addresses(fleet: RunningFleet) -> list[str]:
    """Of all processes that serve metrics."""
    state = RunDirectory.at(fleet.run_dir).running()
    async with open_redis(state.redis_url) as redis:
        records = await Registry(redis, Keys(state.bus_prefix)).living()
    return [record.http_address for record in records if record.http_address]


def cpu_s(fleet: RunningFleet) -> float:
    """CPU seconds that the fleet's processes have taken."""
    total = 0.0
    for process in RunDirectory.at(fleet.run_dir).processes():
        with suppress(psutil.Error):
            times = psutil.Process(process.pid).cpu_times()
            total += times.user + times.system
    return total


async def turn(fleet: RunningFleet, *, requests: int, answer_tokens: int, seed: int) -> tuple[float, float]:
    """(answer tokens per second, CPU seconds per 1,000 answer tokens) of one run."""
    plan = closed(
        count=requests,
        lengths=Lengths(prompt_tokens=64, answer_tokens=answer_tokens),
        vocabulary=VOCABULARY,
        seed=seed,
    )
    before_s = cpu_s(fleet)
    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        report = summarise(await run_closed_loop(plan, driver, concurrency=8))
    assert not report.failed, f"{report.failed} requests failed"
    return report.output_throughput, 1000 * (cpu_s(fleet) - before_s) / (requests * answer_tokens)


async def measured(arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of all turns."""
    work = {"requests": arguments.requests, "answer_tokens": arguments.answer_tokens}
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:
        address, drain = stack.enter_context(collector())
        without = {
            "PYTHONPATH": os.pathsep.join(map(str, [WITHOUT, *_sources()])),
            "OTEL_SDK_DISABLED": "true",
        }
        document = {"workers": 1, "device": arguments.device}
        off = stack.enter_context(running(fleet_document(**document), without))
        on = stack.enter_context(
            running(fleet_document(**document), {"OTEL_EXPORTER_OTLP_ENDPOINT": address})
        )
        addresses = await http_addresses(on)
        for number in range(-1, arguments.turns):
            found: dict[str, tuple[float, float]] = {}
            for name in ("off", "on") if number % 2 else ("on", "off"):
                fleet = on if name == "on" else off
                with scraped(addresses if name == "on" else []):
                    found[name] = await turn(fleet, seed=number + 2, **work)
            if number >= 0:  # the first pair warms both up
                rows.append(
                    {
                        "off_tokens_per_s": found["off"][0],
                        "on_tokens_per_s": found["on"][0],
                        "throughput_ratio": found["on"][0] / found["off"][0],
                        "cpu_ratio": found["on"][1] / found["off"][1],
                    }
                )
        received = drain.received_bytes
    ratios = sorted(row["throughput_ratio"] for row in rows)
    return {
        "device": arguments.device,
        **work,
        "throughput_ratio_median": statistics.median(ratios),
        "throughput_ratio_least": ratios[0],
        "cpu_ratio_median": statistics.median(row["cpu_ratio"] for row in rows),
        "exported_bytes_per_request": received / ((arguments.turns + 1) * arguments.requests),
        "turns": rows,
    }


def _sources() -> list[Path]:
    return [REPOSITORY / "libs", REPOSITORY / "services"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--requests", type=int, default=16, help="per turn")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="null: an engine that computes nothing")
    arguments = parser.parse_args()
    case = "" if arguments.device == "cpu" else arguments.device
    path = write_result("telemetry_cost", asyncio.run(measured(arguments)), case=case)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
