"""Damage of every kind, at any time: a hit is exact, all else is a miss, and the books still agree."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.kvstore_support import (
    HandClock,
    agree,
    bytes_on_disk,
    load,
    opened_store,
    payload,
    save,
    until_settled,
)
from trireme.kvcache.segment_files import DiskCalls
from trireme.kvcache.tiered_store import TieredStore

MIB = 2**20
CHAINS = st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True)
SEEDS = st.integers(0, 2**32)


class FickleDisk:
    """Fails, or writes a part only, when it is told to."""

    def __init__(self) -> None:
        self.fault = 0
        self.torn_bytes: int | None = None

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.torn_bytes is not None:
            # The power goes in the middle of a write: whole pages of it are there, the rest is not.
            kept, self.torn_bytes = self.torn_bytes, None
            pages = b"".join(bytes(buffer) for buffer in buffers)[: kept // 4096 * 4096]
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), pages, offset)
            raise OSError(errno.EIO, "torn")
        if self.fault:
            raise OSError(self.fault, os.strerror(self.fault))
        return os.pwritev(descriptor, buffers, offset)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.fault == errno.EIO:
            raise OSError(self.fault, os.strerror(self.fault))
        return os.preadv(descriptor, buffers, offset)


class NothingIsEverWrong(RuleBasedStateMachine):
    """Saves and loads between flipped bits, torn and failing writes, kills and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = HandClock()
        self.disk = FickleDisk()
        self.flips = 0
        self.start()

    def start(self) -> None:
        self.stack = AsyncExitStack()
        opened = opened_store(
            Path(self.directory.name),
            dram_bytes=4 * 65536,
            ssd_bytes=2 * MIB,
            clock=self.clock,
            calls=DiskCalls(pwritev=self.disk.pwritev, preadv=self.disk.preadv),
        )
        self.store: TieredStore = self.runner.run(self.stack.enter_async_context(opened))

    @rule(chain=CHAINS)
    def save(self, chain: list[int]) -> None:
        async def body() -> None:
            save(self.store, [(n, self.bytes_of(n)) for n in chain])
            self.clock.now_s += 0.01
            await until_settled(self.store)

        self.runner.run(body())

    @rule(chain=CHAINS)
    def load(self, chain: list[int]) -> None:
        found = self.runner.run(load(self.store, chain))
        assert found == [self.bytes_of(n) for n in chain[: len(found)]]

    @rule(seed=SEEDS)
    def flip_in_dram(self, seed: int) -> None:
        pick = random.Random(seed)
        blocks = [block for block in self.store.table.blocks.values() if block.in_dram]
        if blocks:
            image = self.store.dram.image(pick.choice(blocks))
            image[pick.randrange(len(image))] ^= 1 << pick.randrange(8)
            self.flips += 1

    @rule(seed=SEEDS)
    def flip_on_ssd(self, seed: int) -> None:
        pick = random.Random(seed)
        files = sorted(Path(self.directory.name, "ssd").glob("segment-*"))
        # One that a disk thread is making is renamed at any moment.
        files = [path for path in files if path.suffix != ".new"]
        if files:
            path = pick.choice(files)
            size = path.stat().st_size
            with path.open("r+b") as file:
                at = pick.randrange(max(1, size))
                byte = os.pread(file.fileno(), 1, at) or b"\0"
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << pick.randrange(8)]), at)

    @rule(torn_bytes=st.integers(0, 40_000))
    def tear_the_next_write(self, torn_bytes: int) -> None:
        self.disk.torn_bytes = torn_bytes

    @rule(fault=st.sampled_from([0, errno.ENOSPC, errno.EIO]))
    def turn_the_disk(self, fault: int) -> None:
        self.disk.fault = fault

    @rule()
    def let_the_disk_recover(self) -> None:
        self.disk.fault, self.disk.torn_bytes = 0, None
        self.clock.now_s += 31
        assert self.store.ssd is not None
        self.runner.run(self.store.ssd.check())
        assert self.store.ssd.is_writable

    @rule(in_order=st.booleans())
    def restart(self, in_order: bool) -> None:
        async def end() -> None:
            if in_order:
                await self.store.flush(deadline_s=60.0)
            await self.stack.aclose()

        self.runner.run(end())
        if not in_order:
            # As after kill -9: what was in DRAM is gone, and segments have no index.
            for path in Path(self.directory.name, "ssd").glob("*.index"):
                path.unlink()
        self.start()

    @invariant()
    def books_agree(self) -> None:
        # A flipped generation shows in the arena and nowhere else, so that check is left to `load`.
        agree(self.store, generations=self.flips == 0)
        assert self.store.dram.used_bytes <= self.store.dram.capacity_bytes
        assert bytes_on_disk(Path(self.directory.name, "ssd")) <= 2 * MIB

    def bytes_of(self, number: int) -> bytes:
        return payload(number, (500, 3900, 9000, 30_000)[number % 4])

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.directory.cleanup()


TestIntegrity = NothingIsEverWrong.TestCase
TestIntegrity.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_each_flipped_block_is_one_counted_miss(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=MIB, ssd_bytes=8 * MIB) as store:
        for number in range(40):
            save(store, [(number, payload(number))])
        await store.flush(deadline_s=60.0)
        pick = random.Random(1)
        flipped = pick.sample(range(40), 10)
        for block in list(store.table.blocks.values()):
            number = next(n for n in range(40) if payload(n) == bytes(store.dram.payload(block)))
            if number in flipped:
                store.dram.payload(block)[pick.randrange(3900)] ^= 1 << pick.randrange(8)
        first = [await load(store, [n]) for n in range(40)]
        assert first == [[] if n in flipped else [payload(n)] for n in range(40)]
        assert store.moved.dram_corrupt == 10
        assert [await load(store, [n]) for n in range(40)] == [[payload(n)] for n in range(40)]
        assert store.moved.promoted == 10, "the copy on SSD took over"
        agree(store)
