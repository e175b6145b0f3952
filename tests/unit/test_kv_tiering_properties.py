"""plan, for any store and any queue: never over capacity, never nearer for farther, and done when done."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.kv_items import Item, QueuedJob, State, TierIndex, UseKey
from trireme.policies.kv_tiering import Action, Capacity, Command, plan
from trireme.policies.sorted_keys import SortedKeys

WHERES = ("dram", "ssd", "both", "saving", "fetching", "evicting")
NOW_S = 100.0


@st.composite
def stores(draw: st.DrawFn) -> tuple[TierIndex[int], Capacity]:
    """A store within its capacity, jobs that wait or run, and items that expired."""
    capacity = Capacity(
        dram_bytes=draw(st.integers(20, 300)),
        ssd_bytes=draw(st.sampled_from((0, 50, 200, 1000))),
        is_ssd_writable=draw(st.integers(0, 5)) > 0,
    )
    index: TierIndex[int] = TierIndex()
    rows = st.tuples(
        st.integers(1, 40),
        st.sampled_from(WHERES),
        st.integers(0, 30),
        st.sampled_from((math.inf, math.inf, 50.0, 100.0, 150.0)),
        st.sampled_from((math.inf, math.inf, 110.0, 130.0)),
        st.integers(0, 5),
    )
    for number, (size, where, used, expires, returns, pin) in enumerate(draw(st.lists(rows, max_size=25))):
        item = Item(
            item_id=number,
            size_bytes=size,
            in_dram=where in ("dram", "both", "evicting"),
            on_ssd=where in ("ssd", "both", "fetching"),
            state=State(where) if where in ("saving", "fetching", "evicting") else State.RESIDENT,
            last_use_s=float(used),
            expires_at_s=expires,
            return_s=returns,
            pinned=pin == 0,
        )
        index.put(item)
        if index.dram_bytes > capacity.dram_bytes or index.ssd_bytes > capacity.ssd_bytes:
            index.forget(number)
    chains = st.lists(st.integers(0, 24), max_size=4, unique=True)
    for number, (chain, use) in enumerate(
        draw(st.lists(st.tuples(chains, st.integers(90, 160)), max_size=8))
    ):
        index.enqueue(QueuedJob(job_id=str(number), use_s=float(use), item_ids=tuple(chain)))
    for number in draw(st.sets(st.integers(0, 7), max_size=2)):
        index.start(str(number))
    return index, capacity


def carry_out(index: TierIndex[int], command: Command[int]) -> None:
    item = index.get(command.item_id)
    assert item is not None and item.state is State.RESIDENT and not item.pinned
    assert command.size_bytes == item.size_bytes and command.reason
    if command.action is Action.FETCH:
        assert item.on_ssd and not item.in_dram
        index.put(replace(item, in_dram=True))
    elif command.action is Action.EVICT:
        assert item.in_dram and item.on_ssd != command.is_copy_needed
        index.put(replace(item, in_dram=False, on_ssd=True))
    else:
        assert command.from_dram <= item.in_dram and command.from_ssd <= item.on_ssd
        assert command.from_dram or command.from_ssd
        left = replace(
            item,
            in_dram=item.in_dram and not command.from_dram,
            on_ssd=item.on_ssd and not command.from_ssd,
        )
        if left.in_dram or left.on_ssd:
            index.put(left)
        else:
            index.forget(item.item_id)


def settle(index: TierIndex[int]) -> None:
    """End the copies in flight."""
    for item in list(index):
        if item.state is State.EVICTING:
            index.put(replace(item, state=State.RESIDENT, in_dram=False, on_ssd=True))
        elif item.state is not State.RESIDENT:
            index.put(replace(item, state=State.RESIDENT, in_dram=True))


@settings(max_examples=600, deadline=None)
@given(stores())
def test_no_step_exceeds_a_tier_and_planning_again_gives_nothing(
    store: tuple[TierIndex[int], Capacity],
) -> None:
    index, capacity = store
    for is_settled in (False, True):
        if is_settled:
            settle(index)
        for command in plan(index, capacity, now_s=NOW_S):
            carry_out(index, command)
            # Room that evictions in flight give back may be counted on, by evictions only.
            assert index.dram_bytes <= capacity.dram_bytes
            assert index.ssd_bytes <= max(capacity.ssd_bytes, 0)
        assert plan(index, capacity, now_s=NOW_S) == ()


@settings(max_examples=600, deadline=None)
@given(stores())
def test_nothing_is_evicted_or_lost_for_something_farther(store: tuple[TierIndex[int], Capacity]) -> None:
    index, capacity = store
    commands = plan(index, capacity, now_s=NOW_S)
    by_item = {index.record(key[3]).item.item_id: key for keys in _lists(index) for key in keys}
    fetched = [by_item[c.item_id] for c in commands if c.action is Action.FETCH]
    put_out = [
        by_item[c.item_id]
        for c in commands
        if (c.action is Action.EVICT or c.from_dram)
        and index.is_queued(c.item_id)
        and c.size_bytes <= capacity.window_bytes
    ]
    assert fetched == sorted(fetched)
    assert not (fetched and put_out) or max(fetched) < min(put_out)
    copied = [by_item[c.item_id] for c in commands if c.is_copy_needed]
    for command in _lost(index, commands):
        item = index.get(command.item_id)
        assert item is not None
        if not item.in_dram and item.expires_at_s > NOW_S:  # it made room on SSD
            assert by_item[item.item_id] > min(copied)


def _lists(index: TierIndex[int]) -> tuple[SortedKeys[UseKey], ...]:
    return (index.dram_victims, index.ssd_victims, index.duplicates, index.wanted)


def _lost(index: TierIndex[int], commands: tuple[Command[int], ...]) -> Iterator[Command[int]]:
    for command in commands:
        item = index.get(command.item_id)
        assert item is not None
        if (
            command.action is Action.DROP
            and command.from_dram == item.in_dram
            and (command.from_ssd == item.on_ssd)
        ):
            yield command


@settings(max_examples=400, deadline=None)
@given(stores())
def test_what_jobs_wait_for_or_run_with_does_not_expire_and_is_kept_if_it_can_be(
    store: tuple[TierIndex[int], Capacity],
) -> None:
    index, capacity = store
    lost = {command.item_id for command in _lost(index, plan(index, capacity, now_s=NOW_S))}
    if index.queued_bytes <= capacity.window_bytes + capacity.ssd_bytes:
        assert not any(map(index.is_queued, lost))
    endless = Capacity(dram_bytes=10**9, ssd_bytes=10**9)
    commands = plan(index, endless, now_s=NOW_S)
    assert all(command.action is not Action.EVICT for command in commands)  # infinite DRAM
    for command in commands:
        item = index.get(command.item_id)
        assert item is not None
        if command.action is Action.DROP:
            assert item.expires_at_s <= NOW_S
            assert not index.is_queued(command.item_id) and not index.is_running(command.item_id)


@settings(max_examples=200, deadline=None)
@given(
    uses=st.lists(st.integers(0, 30), min_size=1, max_size=150),
    dram=st.integers(2, 12),
    ssd=st.integers(0, 20),
)
def test_without_a_queue_it_is_lru_on_both_tiers(uses: list[int], dram: int, ssd: int) -> None:
    """Against two ordered dictionaries; items of one byte, so that sizes do not blur the order."""
    capacity = Capacity(dram_bytes=dram, ssd_bytes=ssd, low_free=1 / dram, high_free=1 / dram)
    index: TierIndex[int] = TierIndex()
    in_dram: OrderedDict[int, None] = OrderedDict()
    on_ssd: OrderedDict[int, None] = OrderedDict()
    for now, used in enumerate(uses):
        held = index.get(used) or Item(item_id=used, size_bytes=1)
        index.put(replace(held, in_dram=True, on_ssd=False, last_use_s=float(now)))
        in_dram[used] = None
        in_dram.move_to_end(used)
        on_ssd.pop(used, None)
        for command in plan(index, capacity, now_s=float(now)):
            carry_out(index, command)
        while len(in_dram) > dram - 1:
            on_ssd[in_dram.popitem(last=False)[0]] = None
        while len(on_ssd) > ssd:
            on_ssd.popitem(last=False)
        assert {item.item_id for item in index if item.in_dram} == set(in_dram)
        assert {item.item_id for item in index if item.on_ssd} == set(on_ssd)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("put", "put", "forget", "enqueue", "enqueue", "dequeue", "start", "finish", "follow")
        ),
        st.integers(0, 9),
        st.integers(0, 50),
        st.lists(st.integers(0, 9), max_size=4, unique=True),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_the_index_is_what_building_it_anew_gives(steps: list[tuple[str, int, int, list[int]]]) -> None:
    index: TierIndex[int] = TierIndex()
    waiting: dict[str, QueuedJob[int]] = {}
    running: dict[str, tuple[int, ...]] = {}
    for kind, name, amount, chain in steps:
        job = QueuedJob(job_id=f"j{name}", use_s=float(amount), item_ids=tuple(chain))
        if kind == "put":
            where = WHERES[amount % len(WHERES)]
            index.put(
                Item(
                    item_id=name,
                    size_bytes=amount + 1,
                    in_dram=where in ("dram", "both", "evicting"),
                    on_ssd=where in ("ssd", "both", "fetching"),
                    state=State(where) if where in ("saving", "fetching", "evicting") else State.RESIDENT,
                    last_use_s=float(name),
                    expires_at_s=float(amount) if amount % 3 else math.inf,
                    pinned=amount % 7 == 0,
                )
            )
        elif kind == "forget" and name in index:
            index.forget(name)
        elif kind == "enqueue":
            index.enqueue(job)
            waiting[job.job_id] = job
            running.pop(job.job_id, None)
        elif kind == "dequeue":
            assert index.dequeue(job.job_id) == (job.job_id in waiting)
            waiting.pop(job.job_id, None)
        elif kind == "start":
            index.start(job.job_id)
            running[job.job_id] = waiting.pop(job.job_id).item_ids if job.job_id in waiting else ()
        elif kind == "finish":
            index.finish(job.job_id)
            running.pop(job.job_id, None)
        elif kind == "follow":
            kept = [waiting[job_id] for job_id in sorted(waiting)][: name or None]
            index.follow(kept, now_s=0.0)
            waiting = {each.job_id: each for each in kept}
            assert len(index.jobs) == len(kept)
            order = [
                job_id for _, job_id in sorted((index.job_key(each.job_id), each.job_id) for each in kept)
            ]
            assert order == [each.job_id for each in kept]
    fresh: TierIndex[int] = TierIndex()
    for item in index:
        fresh.put(item)
    for job in sorted(waiting.values(), key=lambda job: index.job_key(job.job_id)):
        fresh.enqueue(replace(job, use_s=index.job_key(job.job_id)[0]))
    for job_id, chain_ids in running.items():
        fresh.enqueue(QueuedJob(job_id=job_id, use_s=0.0, item_ids=chain_ids))
        fresh.start(job_id)
    assert _seen(index) == _seen(fresh)


def _seen(index: TierIndex[int]) -> tuple[object, ...]:
    return (
        [[index.record(key[3]).item.item_id for key in keys] for keys in _lists(index)],
        sorted((expires_at_s, index.record(number).item.item_id) for expires_at_s, number in index.expiring),
        (index.dram_bytes, index.ssd_bytes, index.draining_bytes, index.queued_bytes, len(index)),
    )


def test_the_guard_is_what_holds_nearer_items_back() -> None:
    """Without it the same store is turned over: the property above can fail."""
    index: TierIndex[int] = TierIndex()
    for number in range(3):
        index.put(Item(item_id=number, size_bytes=25, in_dram=number < 2, on_ssd=True))
        index.enqueue(QueuedJob(job_id=str(number), use_s=float(number), item_ids=(number,)))
    index.put(Item(item_id=3, size_bytes=20, in_dram=True, pinned=True))
    capacity = Capacity(dram_bytes=90, ssd_bytes=1000, low_free=0.01, high_free=0.02)
    assert plan(index, capacity, now_s=0.0) == ()
    unguarded = plan(index, capacity, now_s=0.0, is_guarded=False)
    assert [(c.action, c.item_id) for c in unguarded] == [(Action.EVICT, 1), (Action.FETCH, 2)]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_window_of_so_many_jobs(count: int) -> None:
    index: TierIndex[int] = TierIndex()
    for number in range(2):
        index.enqueue(QueuedJob(job_id=str(number), use_s=5.0, item_ids=()))
    key = index.first_jobs_key(count)
    assert sum(job <= key for job in index.jobs) == min(count, 2)
