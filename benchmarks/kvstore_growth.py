"""What the kvstore costs per block and per operation as it grows from 10^3 to 10^6 blocks.

    python -m benchmarks.kvstore_growth [--largest 1000000]

Blocks are small (3.9 KiB, one page with their header), so that 10^6 fit into memory: what is measured
is bookkeeping, not copying. One process, no gRPC, CPU seconds rather than wall time where other work
shares the cores. The store is full except for the share of DRAM that it keeps free; saving puts older
blocks out (there is no SSD tier in this part). A second part opens an SSD tier of as many blocks
from its segments' indexes; its segment files are sparse, as only their indexes are read at start.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.fleet import write_result
from trireme.kvcache.arena import SHARED_MEMORY, own_arena
from trireme.kvcache.block_codec import PAGE_BYTES, BlockKey, block_keys, namespace_digest
from trireme.kvcache.residency_index import ResidencyReader
from trireme.kvcache.saves import NewBlock
from trireme.kvcache.segment_files import SegmentFiles
from trireme.kvcache.segment_sidecar import FoundBlock, FoundRun, encode_sidecar
from trireme.kvcache.stored_blocks import Block
from trireme.kvcache.tiered_store import TieredStore
from trireme.kvcache.waiting_jobs import WaitingJob
from trireme.runtime.clock import SystemClock

NAMESPACE = "benchmark"
PAYLOAD_BYTES = 3900
SAVE_BLOCKS = 16
CHAIN_BLOCKS = 64
JOBS = 256
FREE_SHARE = 0.15
SEGMENT_BLOCKS = 16384


def names(first: int, count: int) -> bytes:
    """Hashes of a chain's blocks, spread as real ones are."""
    spread = 0x9E3779B97F4A7C15F39CC0605CEDC835
    return b"".join(
        (number * spread % 2**128).to_bytes(16, "little") for number in range(first + 1, first + count + 1)
    )


def anonymous_bytes() -> int:
    """Memory of this process that is its own; the arena is shared memory and not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status names no RssAnon")


def save(store: TieredStore, first: int, count: int) -> None:
    """Reserve and commit as a worker does, without writing payloads."""
    hashes = names(first, count)
    wanted = [
        NewBlock(block_hash=hashes[start : start + 16], payload_bytes=PAYLOAD_BYTES)
        for start in range(0, len(hashes), 16)
    ]
    blocks = [found for found in store.saves.reserve(NAMESPACE, "t", wanted) if isinstance(found, Block)]
    store.saves.commit([block.generation for block in blocks], [0] * len(blocks))


def cpu_us(action: Callable[[int], object], *, rounds: int) -> tuple[float, float]:
    """Mean CPU microseconds of one call, and the most CPU milliseconds of one."""
    started_s, longest_s = time.process_time(), 0.0
    for number in range(rounds):
        before_s = time.process_time()
        action(number)
        longest_s = max(longest_s, time.process_time() - before_s)
    return (time.process_time() - started_s) / rounds * 1e6, longest_s * 1e3


async def acquire_and_release(store: TieredStore, chains: Sequence[bytes]) -> float:
    """Mean CPU microseconds of keeping one chain in place and letting go of it."""
    started_s = time.process_time()
    for chain in chains:
        acquired = await store.acquire(NAMESPACE, chain, deadline_s=1.0, lease_s=10.0)
        if len(acquired.blocks) != len(chain) // 16:
            raise SystemExit("a chain that was saved is not there")
        store.release(acquired.lease_id)
    return (time.process_time() - started_s) / len(chains) * 1e6


async def measure_dram(blocks: int) -> dict[str, float]:
    """Operations of a store that holds so many blocks."""
    dram_bytes = int(blocks * PAGE_BYTES / (1 - FREE_SHARE)) + 2**20
    directory = SHARED_MEMORY if SHARED_MEMORY.exists() else Path(tempfile.gettempdir())
    with own_arena(directory, dram_bytes=dram_bytes) as arena:
        async with TieredStore.opened(arena, None, clock=SystemClock()) as store:
            gc.collect()
            before_bytes, filled_s = anonymous_bytes(), time.process_time()
            for first in range(0, blocks, SAVE_BLOCKS):
                save(store, first, SAVE_BLOCKS)
            filled_s = time.process_time() - filled_s
            held_bytes = anonymous_bytes() - before_bytes
            held = store.table.dram_blocks
            rounds = 300
            starts = [n * CHAIN_BLOCKS % (blocks - CHAIN_BLOCKS) for n in range(rounds)]
            chains = [names(first, CHAIN_BLOCKS) for first in starts]
            reader = ResidencyReader(arena.index)
            match_us, _ = cpu_us(lambda n: store.match(NAMESPACE, chains[n]), rounds=rounds)
            local_us, _ = cpu_us(lambda n: reader.match(NAMESPACE, chains[n]), rounds=rounds)
            missing = names(2 * blocks, CHAIN_BLOCKS)
            cold_us, _ = cpu_us(lambda n: reader.match(NAMESPACE, missing), rounds=rounds)
            acquire_us = await acquire_and_release(store, chains)
            order = [WaitingJob(str(first), time.monotonic() + 1) for first in starts[:JOBS]]
            told: dict[str, Sequence[BlockKey]] = {
                str(first): block_keys(NAMESPACE, chain) for first, chain in zip(starts, chains, strict=True)
            }
            store.look_ahead.hear("s", order, told)
            first_plan_us, _ = cpu_us(lambda n: store.look_ahead.replan(), rounds=1)
            plan_us, _ = cpu_us(lambda n: store.look_ahead.replan(), rounds=50)
            store.look_ahead.hear("s", [], {})
            gc.freeze()  # as the service does
            # Full: each save puts blocks out, and planning keeps room free.
            for first in range(3 * blocks, 3 * blocks + int(1.3 * FREE_SHARE * blocks), SAVE_BLOCKS):
                save(store, first, SAVE_BLOCKS)
                store.look_ahead.replan()

            def save_and_plan(number: int) -> None:
                save(store, 5 * blocks + number * SAVE_BLOCKS, SAVE_BLOCKS)
                store.look_ahead.replan()

            evicted = store.moved.evicted
            save_us, save_longest_ms = cpu_us(save_and_plan, rounds=rounds)
            evicted = store.moved.evicted - evicted
    return {
        "blocks": held,
        "fill_us_per_block": round(filled_s / blocks * 1e6, 2),
        "bytes_per_block": round(held_bytes / held),
        "index_bytes_per_block": round(len(arena.index) / held, 1),
        "blocks_without_index_entry": store.residency.left_out,
        "match_us_per_block": round(match_us / CHAIN_BLOCKS, 3),
        "match_blocks_per_s": round(CHAIN_BLOCKS / match_us * 1e6),
        "match_local_us_per_chain": round(local_us, 1),
        "match_local_us_cold_chain": round(cold_us, 1),
        "acquire_release_us_per_block": round(acquire_us / CHAIN_BLOCKS, 3),
        "acquire_release_blocks_per_s": round(CHAIN_BLOCKS / acquire_us * 1e6),
        "save_us_per_block": round(save_us / SAVE_BLOCKS, 3),
        "save_blocks_per_s": round(SAVE_BLOCKS / save_us * 1e6),
        "save_longest_cpu_ms": round(save_longest_ms, 2),
        "blocks_put_out_per_block_saved": round(evicted / (rounds * SAVE_BLOCKS), 2),
        "plan_first_ms": round(first_plan_us / 1e3, 2),
        "plan_again_us": round(plan_us, 1),
    }


def lay_segments(directory: Path, blocks: int) -> None:
    """Sparse segments with their indexes, as a store that ended in order leaves them."""
    digest, now_s = namespace_digest(NAMESPACE), time.time()
    for number, first in enumerate(range(0, blocks, SEGMENT_BLOCKS), 1):
        hashes = names(first, min(SEGMENT_BLOCKS, blocks - first))
        found = [
            FoundBlock(BlockKey(digest + hashes[16 * n : 16 * n + 16]), PAYLOAD_BYTES, n, n * PAGE_BYTES)
            for n in range(len(hashes) // 16)
        ]
        runs = [
            FoundRun("t", now_s, now_s, found[n : n + SAVE_BLOCKS]) for n in range(0, len(found), SAVE_BLOCKS)
        ]
        path = directory / f"segment-{number:010d}.kv"
        with path.open("wb") as file:
            file.truncate(len(found) * PAGE_BYTES)
        path.with_suffix(".index").write_bytes(encode_sidecar(runs, segment_bytes=len(found) * PAGE_BYTES))


async def measure_ssd(blocks: int) -> dict[str, float]:
    """Opening an SSD tier of so many blocks."""
    ssd_bytes = 2 * blocks * PAGE_BYTES + 2**26
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        lay_segments(directory, blocks)
        with own_arena(directory, dram_bytes=2**26, ssd_bytes=ssd_bytes) as arena:
            gc.collect()
            before_bytes, started_s = anonymous_bytes(), time.process_time()
            files = SegmentFiles(directory)
            async with TieredStore.opened(arena, files, ssd_bytes=ssd_bytes, clock=SystemClock()) as store:
                while store.ssd is None or not store.ssd.serving:
                    await asyncio.sleep(0.05)
                opened_s = time.process_time() - started_s
                held = len(store.table.blocks)
                return {
                    "ssd_blocks": held,
                    "ssd_open_cpu_s": round(opened_s, 3),
                    "ssd_open_us_per_block": round(opened_s / held * 1e6, 2),
                    "ssd_bytes_per_block": round((anonymous_bytes() - before_bytes) / held),
                }


async def one_size(blocks: int) -> None:
    """Both parts, in a process of their own, as one line of JSON."""
    import json

    print(json.dumps(await measure_dram(blocks) | await measure_ssd(blocks)))


def main() -> None:
    """Entry point."""
    import json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        asyncio.run(one_size(args.one))
        return
    sizes = [10**exponent for exponent in range(3, 7) if 10**exponent <= args.largest]
    rows = []
    for blocks in sizes:
        command = [sys.executable, "-m", "benchmarks.kvstore_growth", "--one", str(blocks)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
    write_result("kvstore_growth", {"payload_bytes": PAYLOAD_BYTES, "sizes": rows})


if __name__ == "__main__":
    main()
