"""Cost per request and per token as workers, streams and tenants grow, with an engine that computes nothing.

    python -m benchmarks.scaling [--requests 1000]

All processes and the load itself share this machine's cores: what is shown is work per request,
not what a cluster reaches.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence

import psutil

from benchmarks.fleet import MODEL, RunningFleet, fleet_document, running, write_result
from trireme.load.drivers import grpc_driver
from trireme.load.plan import Lengths, closed
from trireme.load.report import summarise
from trireme.load.run import run_closed_loop


def cpu_seconds(fleet: RunningFleet) -> float:
    """CPU time of all processes of the fleet so far."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if process.environ().get("TRIREME_RUN_DIR") == str(fleet.run_dir):
                times = process.cpu_times()
                total += times.user + times.system
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


async def measure(
    fleet: RunningFleet, *, requests: int, streams: int, answer_tokens: int, tenants: int = 1
) -> dict[str, float]:
    """One closed-loop run."""
    lengths = Lengths(prompt_tokens=64, answer_tokens=answer_tokens)
    seed = time.monotonic_ns()  # new prompts in every run: none is found in a cache
    plan = closed(count=requests, lengths=lengths, vocabulary=4000, seed=seed, tenants=tenants)
    before_s = cpu_seconds(fleet)
    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        report = summarise(await run_closed_loop(plan, driver, concurrency=streams))
    spent_s = cpu_seconds(fleet) - before_s
    return {
        "streams": streams,
        "tenants": tenants,
        "failed": report.failed,
        "requests_per_s": round(report.request_throughput, 1),
        "tokens_per_s": round(report.output_throughput, 1),
        "ttft_ms_p50": round(report.ttft_ms.p50, 2),
        "ttft_ms_p99": round(report.ttft_ms.p99, 2),
        "fleet_cpu_ms_per_request": round(1000 * spent_s / requests, 3),
        "fleet_cpu_us_per_token": round(1e6 * spent_s / report.answer_tokens, 1),
    }


async def sweep(worker_counts: Sequence[int], requests: int) -> dict[str, list[dict[str, float]]]:
    """Workers, then streams, then tenants; the others stay at their middle."""
    figures: dict[str, list[dict[str, float]]] = {"workers": [], "streams": [], "tenants": []}
    for workers in worker_counts:
        document = fleet_document(workers=workers, device="null", max_sequences=256, max_batch_tokens=65536)
        with running(document) as fleet:
            await measure(fleet, requests=200, streams=32, answer_tokens=8)  # warm up
            row = await measure(fleet, requests=requests, streams=64, answer_tokens=32)
            figures["workers"].append({"workers": workers, **row})
            if workers != 2:
                continue
            for streams in (1, 8, 64, 256):
                count = requests if streams > 1 else requests // 5
                row = await measure(fleet, requests=count, streams=streams, answer_tokens=32)
                figures["streams"].append(row)
            for tenants in (1, 16, 256):
                row = await measure(fleet, requests=requests, streams=64, answer_tokens=32, tenants=tenants)
                figures["tenants"].append(row)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    figures = asyncio.run(sweep(arguments.workers, arguments.requests))
    path = write_result("scaling", dict(figures))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
