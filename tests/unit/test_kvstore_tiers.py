"""The store against independent models: every hit is exact, and both tiers keep their bounds."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.kvstore_support import (
    NAMESPACE,
    HandClock,
    agree,
    block_hash,
    load,
    opened_store,
    payload,
    save,
    until_settled,
)
from trireme.kvcache.segment_files import DiskCalls
from trireme.kvcache.tiered_store import TieredStore

SLOTS = 16
ARENA = SLOTS * 4096
CHAINS = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)


class DramAgainstADict(RuleBasedStateMachine):
    """Blocks of one size in DRAM alone: equal to an ordered dict that holds 16."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.stack = AsyncExitStack()
        opened = opened_store(Path(self.directory.name), dram_bytes=ARENA)
        self.store = self.runner.run(self.stack.enter_async_context(opened))
        self.model: OrderedDict[int, bytes] = OrderedDict()

    @rule(chain=CHAINS)
    def save(self, chain: list[int]) -> None:
        present = [number for number in chain if number in self.model]
        for number in reversed(present):
            self.model.move_to_end(number)
        fresh = [number for number in chain if number not in self.model]
        while len(self.model) + len(fresh) > SLOTS:
            self.model.popitem(last=False)
        for number in reversed(fresh):
            self.model[number] = payload(number)
        assert save(self.store, [(n, payload(n)) for n in chain]) == len(fresh)

    @rule(chain=CHAINS)
    def load(self, chain: list[int]) -> None:
        hits = next((i for i, number in enumerate(chain) if number not in self.model), len(chain))
        for number in reversed(chain[:hits]):
            self.model.move_to_end(number)
        assert self.runner.run(load(self.store, chain)) == [self.model[n] for n in chain[:hits]]

    @invariant()
    def holds_the_same(self) -> None:
        for number in range(41):
            assert self.store.match(NAMESPACE, block_hash(number))[1] == (number in self.model)

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.directory.cleanup()


class TiersAgainstTheirHistory(RuleBasedStateMachine):
    """Blocks of many sizes over both tiers, with readers that hold and die, restarts and no disk."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = HandClock()
        self.start()

    def start(self) -> None:
        self.stack = AsyncExitStack()
        self.store = self.runner.run(self.enter())

    async def enter(self) -> TieredStore:
        opened = opened_store(
            Path(self.directory.name), dram_bytes=4 * 65536, ssd_bytes=2**20, clock=self.clock
        )
        return await self.stack.enter_async_context(opened)

    @rule(chain=CHAINS)
    def save(self, chain: list[int]) -> None:
        async def body() -> None:
            save(self.store, [(n, self.bytes_of(n)) for n in chain])
            self.store.look_ahead.replan()
            await asyncio.sleep(0)

        self.runner.run(body())

    @rule(chain=CHAINS)
    def load(self, chain: list[int]) -> None:
        matched, in_dram = self.store.match(NAMESPACE, b"".join(map(block_hash, chain)))
        found = self.runner.run(load(self.store, chain))
        assert found == [self.bytes_of(n) for n in chain[: len(found)]]
        assert in_dram <= len(found) <= matched

    @rule(chain=CHAINS, lease_s=st.sampled_from([0.5, 5.0]))
    def hold(self, chain: list[int], lease_s: float) -> None:
        hashes = b"".join(map(block_hash, chain))
        self.runner.run(self.store.acquire(NAMESPACE, hashes, deadline_s=1.0, lease_s=lease_s))

    @rule(seconds=st.sampled_from([0.3, 3.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.store.sweep()
        self.runner.run(self.plan())

    @rule(flush=st.booleans())
    def restart(self, flush: bool) -> None:
        self.runner.run(self.leave(flush))
        self.start()

    @invariant()
    def bounded(self) -> None:
        store = self.store
        assert store.ssd is not None and not store.ssd.status
        assert store.dram.used_bytes <= store.dram.capacity_bytes == 4 * 65536
        assert store.ssd.segments.used_bytes <= 2**20
        assert store.moved.dram_corrupt == store.moved.ssd_corrupt == 0
        agree(store)

    async def plan(self) -> None:
        self.store.look_ahead.replan()
        await asyncio.sleep(0.001)

    async def leave(self, flush: bool) -> None:
        if flush:
            await self.store.flush(deadline_s=60.0)
        await self.stack.aclose()

    def bytes_of(self, number: int) -> bytes:
        return payload(number, (500, 3900, 9000, 60_000)[number % 4])

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.directory.cleanup()


TestDram = DramAgainstADict.TestCase
TestDram.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestTiers = TiersAgainstTheirHistory.TestCase
TestTiers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


async def test_what_dram_puts_out_comes_back_from_ssd(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        for number in range(3 * SLOTS):
            save(store, [(number, payload(number))])
            await until_settled(store)
        assert store.match(NAMESPACE, block_hash(0)) == (1, 0)
        everything = [payload(n) for n in range(3 * SLOTS)]
        assert [(await load(store, [n]))[0] for n in range(3 * SLOTS)] == everything
        assert store.moved.promoted >= 2 * SLOTS
        await until_settled(store)
        assert store.ssd is not None and store.ssd.segments.live_blocks >= 2 * SLOTS


async def test_a_chain_longer_than_dram_is_cut_and_never_wrong(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        for number in range(2 * SLOTS):
            save(store, [(number, payload(number))])
            await until_settled(store)
        found = await load(store, range(2 * SLOTS))
        assert found == [payload(n) for n in range(SLOTS)]


async def test_a_flush_makes_a_restart_warm(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        save(store, [(n, payload(n)) for n in range(SLOTS)])
        assert await store.flush(deadline_s=60.0) == SLOTS
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        assert store.table.dram_blocks == 0
        assert await load(store, range(SLOTS)) == [payload(n) for n in range(SLOTS)]


async def test_a_corrupt_copy_in_dram_is_replaced_by_the_one_on_ssd(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        save(store, [(0, payload(0))])
        await store.flush(deadline_s=60.0)
        held = await store.acquire(NAMESPACE, block_hash(0), deadline_s=1.0, lease_s=5.0)
        store.dram.payload(held.blocks[0])[9] ^= 4
        store.release(held.lease_id)
        assert await load(store, [0]) == []
        assert await load(store, [0]) == [payload(0)]


class SlowDisk:
    """Reads when it is told to."""

    def __init__(self) -> None:
        self.may_read = threading.Event()

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.may_read.wait(timeout=60)
        return os.preadv(descriptor, buffers, offset)


async def test_a_block_that_comes_late_is_a_miss_now_and_a_hit_next_time(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20) as store:
        save(store, [(0, payload(0))])
        await store.flush(deadline_s=60.0)
    disk = SlowDisk()
    calls = DiskCalls(preadv=disk.preadv)
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=2**20, calls=calls) as store:
        assert await load(store, [0], deadline_s=0.01) == []
        assert store.counters.late == 1
        other_readers = [asyncio.create_task(load(store, [0])) for _ in range(3)]
        await asyncio.sleep(0)
        disk.may_read.set()
        assert await asyncio.gather(*other_readers) == [[payload(0)]] * 3
        assert store.moved.promoted == 1, "one read served all"
        assert store.dram.num_leases == 0
        agree(store)
