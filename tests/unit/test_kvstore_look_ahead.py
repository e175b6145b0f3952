"""Look-ahead, time to live and shares: who is in DRAM when, who goes, and who pays."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

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
from trireme.kvcache.block_codec import BlockKey, block_keys
from trireme.kvcache.sessions import Sessions
from trireme.kvcache.tenant_ledger import Shares
from trireme.kvcache.tiered_store import Limits, TieredStore
from trireme.kvcache.waiting_jobs import SOURCE_S, WaitingJob, WaitingJobs

MIB = 2**20
SLOTS = 32
ARENA = SLOTS * 4096


def keys(numbers: Sequence[int]) -> list[BlockKey]:
    return block_keys(NAMESPACE, b"".join(map(block_hash, numbers)))


def hear(store: TieredStore, queue: Sequence[Sequence[int]], *, now_s: float, source: str = "s") -> None:
    """A source's queue: jobs named by their chains, a second apart."""
    order = [WaitingJob(str(list(chain)), now_s + 1 + place) for place, chain in enumerate(queue)]
    store.look_ahead.hear(source, order, {str(list(chain)): keys(chain) for chain in queue})


def in_dram(store: TieredStore, numbers: Sequence[int]) -> list[int]:
    return [n for n in numbers if store.match(NAMESPACE, block_hash(n))[1]]


def here(store: TieredStore, numbers: Sequence[int]) -> list[int]:
    return [n for n in numbers if store.match(NAMESPACE, block_hash(n))[0]]


async def filled(store: TieredStore, count: int, clock: HandClock) -> None:
    """So many one-block sessions, one after another."""
    for number in range(count):
        clock.now_s += 1
        save(store, [(number, payload(number))])
        await until_settled(store)


async def test_room_is_kept_free_so_that_saving_never_waits(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock) as store:
        await filled(store, 3 * SLOTS, clock)
        assert store.dram.free_bytes >= 0.1 * ARENA
        assert store.moved.unsaved == 0, "every eviction was written first"
        assert here(store, range(3 * SLOTS)) == list(range(3 * SLOTS))
        agree(store)


async def test_what_the_queue_needs_is_fetched_in_its_order_and_not_beyond_the_room(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock) as store:
        await filled(store, 3 * SLOTS, clock)
        old = list(range(60))
        assert in_dram(store, old) == []
        # The order of the queue, which is neither that of arrival nor of use.
        queue = [[n] for n in (50, 3, 41, 7)]
        hear(store, queue, now_s=clock.now_s)
        await until_settled(store)
        assert in_dram(store, old) == [3, 7, 41, 50]
        assert store.moved.fetched_ahead == 4
        # Sixty sessions wait: those in front are here, up to the room that is kept free; then peace.
        hear(store, [[n] for n in old], now_s=clock.now_s)
        await until_settled(store)
        there = in_dram(store, old)
        assert there == old[: len(there)] and SLOTS * 0.8 <= len(there) <= SLOTS * 0.9
        assert store.look_ahead.replan() == 0
        agree(store)


async def test_what_waits_is_not_put_out_for_what_comes_later(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock) as store:
        await filled(store, 20, clock)
        hear(store, [[n] for n in range(4)], now_s=clock.now_s)
        store.look_ahead.replan()
        # Many newer sessions come and go; by use alone the four would be the first to leave.
        for number in range(100, 180):
            clock.now_s += 0.01
            save(store, [(number, payload(number))])
            hear(store, [[n] for n in range(4)], now_s=clock.now_s)
            await until_settled(store)
        assert in_dram(store, range(20)) == [0, 1, 2, 3]
        agree(store)


async def test_a_valid_copy_on_ssd_makes_the_second_eviction_free(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock) as store:
        assert store.ssd is not None
        await filled(store, 2 * SLOTS, clock)
        for round_ in range(3):
            clock.now_s += 1
            assert await load(store, [round_]) == [payload(round_)]
            await until_settled(store)
        written = store.ssd.segments.used_bytes
        for number in itertools.chain(range(40), range(40)):
            clock.now_s += 1
            assert await load(store, [number]) == [payload(number)]
            await until_settled(store)
        grown = store.ssd.segments.used_bytes - written
        assert grown <= SLOTS * 4096, "each block is written once at most"
        agree(store)


async def test_blocks_saved_after_their_hint_are_kept_for_it(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock) as store:
        hear(store, [[0, 1]], now_s=clock.now_s)
        store.look_ahead.replan()
        assert len(store.look_ahead.jobs) == 0
        save(store, [(0, payload(0))])
        store.look_ahead.replan()
        save(store, [(1, payload(1))])
        store.look_ahead.replan()
        assert len(store.look_ahead.jobs) == 1
        run = store.table.blocks[keys([1])[0]].run
        assert run is not None and store.table.index.is_queued(run.number)


def order_of(jobs: WaitingJobs) -> list[str]:
    return [job.job_id for job in jobs._queue]


@settings(max_examples=60)
@given(
    queues=st.lists(
        st.lists(
            st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 100)), max_size=6, unique_by=lambda e: e[0]
        ),
        min_size=1,
        max_size=8,
    )
)
def test_sources_speak_for_themselves_and_their_order_stands(queues: list[list[tuple[str, float]]]) -> None:
    # Reference: the last word of each of two sources, each in its own order, merged by start; a job that
    # both name counts where it is sooner.
    store_blocks: dict[BlockKey, object] = {}
    jobs = WaitingJobs()
    chains = {name: keys([ord(name)]) for name in "abcdefgh"}

    class Stored:
        class run:
            number = 7

    for chain in chains.values():
        store_blocks[chain[0]] = Stored
    last: dict[str, list[tuple[str, float]]] = {}
    for turn, queue in enumerate(queues):
        source = f"s{turn % 2}"
        last[source] = queue
        order = [WaitingJob(name, start_s) for name, start_s in queue]
        jobs.hear(source, order, {name: chains[name] for name, _ in queue}, now_s=float(turn))
        jobs.refresh(store_blocks, now_s=float(turn))  # type: ignore[arg-type]
    expected: list[tuple[float, int, str]] = []
    for queue in last.values():
        start_s = 0.0
        for place, (name, estimate_s) in enumerate(queue):
            start_s = max(start_s, estimate_s)
            expected.append((start_s, place, name))
    starts: dict[str, float] = {}
    for start_s, _, name in expected:
        starts[name] = min(start_s, starts.get(name, float("inf")))
    told = order_of(jobs)
    assert sorted(told) == sorted(starts)
    assert [starts[name] for name in told] == sorted(starts.values())
    jobs.refresh(store_blocks, now_s=len(queues) + SOURCE_S + 1)  # type: ignore[arg-type]
    assert order_of(jobs) == [], "sources that went silent are forgotten"


async def test_what_nobody_uses_for_its_time_to_live_is_deleted_in_both_tiers(tmp_path: Path) -> None:
    clock = HandClock()
    limits = Limits(ttl_s=100.0)
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock, limits=limits) as store:
        await filled(store, SLOTS + 8, clock)  # the first went to SSD
        clock.now_s += 50
        assert await load(store, [20]) == [payload(20)]
        clock.now_s += 40
        hear(store, [[21]], now_s=clock.now_s)
        await until_settled(store)
        clock.now_s += 30
        hear(store, [[21]], now_s=clock.now_s)
        await until_settled(store)
        # 20 was used lately and a job waits for 21; all others are over a hundred seconds old.
        assert here(store, range(SLOTS + 8)) == [20, 21]
        assert store.look_ahead.outlived_blocks == SLOTS + 6
        agree(store)


async def test_time_to_live_goes_on_over_a_restart_and_a_clock_that_was_set_back(tmp_path: Path) -> None:
    clock = HandClock()
    limits = Limits(ttl_s=100.0)
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock, limits=limits) as store:
        save(store, [(0, payload(0))])
        clock.now_s += 60
        save(store, [(1, payload(1))])
        await store.flush(deadline_s=60.0)
    clock.now_s += 60  # 0 was used 120 s ago, 1 was 60 s ago
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock, limits=limits) as store:
        assert here(store, [0, 1]) == [1]
        clock.now_s += 39
        store.look_ahead.replan()
        assert here(store, [0, 1]) == [1]
        clock.now_s += 2
        store.look_ahead.replan()
        assert here(store, [0, 1]) == []
        save(store, [(2, payload(2))])
        await store.flush(deadline_s=60.0)
    clock.now_s -= 5000  # what was used "in the future" lives for a whole time to live from now
    async with opened_store(tmp_path, dram_bytes=ARENA, ssd_bytes=MIB, clock=clock, limits=limits) as store:
        assert here(store, [2]) == [2]
        clock.now_s += 101
        store.look_ahead.replan()
        assert here(store, [2]) == []


async def test_a_tenant_over_its_share_gives_up_its_own_oldest_and_nobody_elses(tmp_path: Path) -> None:
    clock = HandClock()
    limits = Limits(shares=Shares(default=0.25, by_tenant={"big": 0.5}))
    async with opened_store(tmp_path, dram_bytes=ARENA, clock=clock, limits=limits) as store:
        for number in range(4):
            save(store, [(1000 + number, payload(1000 + number))], tenant="quiet")
        for number in range(100):
            save(store, [(number, payload(number))], tenant="loud")
            save(store, [(200 + number, payload(200 + number))], tenant="big")
            assert store.table.dram_ledger.bytes["loud"] <= 0.25 * ARENA
            assert store.table.dram_ledger.bytes["big"] <= 0.5 * ARENA
        assert in_dram(store, range(1000, 1004)) == list(range(1000, 1004))
        assert in_dram(store, range(100)) == list(range(92, 100))
        assert in_dram(store, range(200, 300)) == list(range(284, 300))
        assert store.table.dram_ledger.over_quota == {"loud": 92, "big": 84}
        agree(store)
        # What it reads now it keeps, and then there is no room for more of it.
        held = await store.acquire(
            NAMESPACE, b"".join(map(block_hash, range(92, 100))), deadline_s=0.0, lease_s=5.0
        )
        assert save(store, [(500, payload(500))], tenant="loud") == 0
        assert save(store, [(501, payload(501))], tenant="quiet") == 1
        store.release(held.lease_id)
        assert save(store, [(500, payload(500))], tenant="loud") == 1


async def test_shares_hold_on_ssd_and_for_what_comes_back_from_it(tmp_path: Path) -> None:
    clock = HandClock()
    limits = Limits(shares=Shares(default=0.25))
    async with opened_store(
        tmp_path, dram_bytes=ARENA, ssd_bytes=4 * ARENA, clock=clock, limits=limits
    ) as store:
        save(store, [(1000, payload(1000))], tenant="quiet")
        for number in range(80):
            clock.now_s += 1
            save(store, [(number, payload(number))], tenant="loud")
            await until_settled(store)
            assert store.table.dram_ledger.bytes["loud"] <= 0.25 * ARENA + 4096, "one may be on its way out"
            assert store.table.ssd_ledger.bytes["loud"] <= ARENA
        assert in_dram(store, [1000]) == [1000]
        kept = here(store, range(80))
        assert kept == list(range(80 - len(kept), 80)) and len(kept) >= SLOTS
        # Reading its chain from SSD does not push the others out either.
        found = []
        for number in reversed(kept):
            found += await load(store, [number])
            await store.look_ahead.settle()
            assert store.table.dram_ledger.bytes["loud"] <= 0.25 * ARENA + 4096
        assert len(found) > len(kept) // 2
        assert in_dram(store, [1000]) == [1000]
        agree(store)


def test_of_two_turns_of_a_session_the_later_one_stays_whichever_is_told_last() -> None:
    for told in itertools.permutations([(1, [1]), (2, [1, 2]), (3, [1, 3])]):
        sessions = Sessions(ttl_s=100.0)
        applied = [
            sessions.note("t", "s", NAMESPACE, keys(chain), version=version, now_s=0.0)
            for version, chain in told
        ]
        session = sessions.get("t", "s")
        assert session is not None and session.version == 3 and list(session.keys) == keys([1, 3])
        highest = itertools.accumulate((version for version, _ in told), max)
        expected = [version == top for (version, _), top in zip(told, highest, strict=True)]
        assert applied == expected
        assert not sessions.note("t", "s", NAMESPACE, keys([9]), version=3, now_s=0.0), "told twice"
        assert sessions.get("other", "s") is None, "a tenant sees its own conversations"


def test_sessions_are_bounded_and_outlive_their_last_turn_by_the_time_to_live() -> None:
    sessions = Sessions(ttl_s=100.0, max_sessions=3)
    for number in range(5):
        sessions.note("t", str(number), NAMESPACE, keys([number]), version=1, now_s=float(number))
    assert [sessions.get("t", str(n)) is not None for n in range(5)] == [False, False, True, True, True]
    sessions.note("t", "2", NAMESPACE, keys([2, 3]), version=2, now_s=50.0)
    sessions.expire(104.0)
    assert len(sessions) == 1 and sessions.get("t", "2") is not None


async def test_two_concurrent_turns_lose_no_block(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=ARENA) as store:
        for version, chain in ((2, [0, 1, 2]), (1, [0, 1, 3, 4])):
            await asyncio.sleep(0)
            save(store, [(n, payload(n)) for n in chain])
            hashes = b"".join(map(block_hash, chain))
            assert store.note_session("t", "s", NAMESPACE, hashes, version=version) == (version == 2)
        session = store.sessions.get("t", "s")
        assert session is not None and list(session.keys) == keys([0, 1, 2])
        assert await load(store, [0, 1, 3, 4]) == [payload(n) for n in (0, 1, 3, 4)]
