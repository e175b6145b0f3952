"""plan: what jobs wait for comes in, what is needed last goes, and planning again finds nothing to do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trireme.policies.kv_items import Item, QueuedJob, State, TierIndex
from trireme.policies.kv_tiering import Action, Capacity, Command, plan


def item(
    name: str, *, size: int = 10, where: str = "dram", used: float = 0.0, ttl: float = math.inf
) -> Item[str]:
    return Item(
        item_id=name,
        size_bytes=size,
        in_dram="dram" in where,
        on_ssd="ssd" in where,
        last_use_s=used,
        expires_at_s=used + ttl,
    )


def holding(*items: Item[str]) -> TierIndex[str]:
    index: TierIndex[str] = TierIndex()
    for each in items:
        index.put(each)
    return index


def wait(index: TierIndex[str], *chains: str) -> None:
    """Jobs in this order; a chain is written "a b"."""
    for position, chain in enumerate(chains):
        index.enqueue(
            QueuedJob(job_id=f"job {position}", use_s=float(position), item_ids=tuple(chain.split()))
        )


def apply(index: TierIndex[str], commands: tuple[Command[str], ...]) -> None:
    for command in commands:
        held = index.get(command.item_id)
        assert held is not None
        match command.action:
            case Action.FETCH:
                assert held.on_ssd and not held.in_dram
                index.put(replace(held, in_dram=True))
            case Action.EVICT:
                assert held.in_dram and held.on_ssd != command.is_copy_needed
                index.put(replace(held, in_dram=False, on_ssd=True))
            case Action.DROP:
                left = replace(
                    held,
                    in_dram=held.in_dram and not command.from_dram,
                    on_ssd=held.on_ssd and not command.from_ssd,
                )
                if left.in_dram or left.on_ssd:
                    index.put(left)
                else:
                    index.forget(left.item_id)


def said(commands: tuple[Command[str], ...]) -> list[str]:
    return [f"{command.action.value} {command.item_id}" for command in commands]


ROOM = Capacity(dram_bytes=100, ssd_bytes=1000)  # evicts below 10 free, up to 15


def test_what_waits_on_ssd_is_fetched_in_queue_order_while_it_fits() -> None:
    index = holding(*(item(name, size=30, where="ssd") for name in "abcd"))
    wait(index, "c", "a", "d b")
    assert said(plan(index, ROOM, now_s=0)) == ["fetch c", "fetch a"]  # 85 bytes of window: 2.1 jobs of 40


def test_idle_items_leave_dram_last_used_first_until_the_high_watermark() -> None:
    index = holding(*(item(f"i{used}", size=5, used=used) for used in range(19)))
    assert said(plan(index, ROOM, now_s=99)) == ["evict i0", "evict i1"]


def test_nothing_nearer_gives_way_to_something_farther() -> None:
    index = holding(*(item(name, size=20) for name in "abcd"), item("z", size=20, where="ssd"))
    wait(index, "a", "b", "c", "d", "z")
    assert plan(index, replace(ROOM, high_free=0.1), now_s=0) == ()


def test_an_item_without_a_job_gives_way_and_its_valid_ssd_copy_spares_the_write() -> None:
    index = holding(
        item("a", size=40), item("old", size=40, where="dram+ssd"), item("z", size=40, where="ssd")
    )
    wait(index, "a", "z")
    evict, fetch = plan(index, ROOM, now_s=0)
    assert said((evict, fetch)) == ["evict old", "fetch z"]
    assert not evict.is_copy_needed


def test_a_full_ssd_gives_up_copies_that_dram_holds_before_anything_is_lost() -> None:
    index = holding(
        item("new", size=40, used=9),
        item("both", size=50, where="dram+ssd", used=8),
        item("idle", size=40, where="ssd"),
    )
    commands = plan(index, Capacity(dram_bytes=95, ssd_bytes=90), now_s=10)
    assert said(commands) == ["evict both"]  # its copy is valid: nothing to write, nothing to delete
    index.put(item("both", size=50, where="dram+ssd", used=10))
    commands = plan(index, Capacity(dram_bytes=95, ssd_bytes=90), now_s=10)
    assert said(commands) == ["drop both", "evict new"]
    assert commands[0].from_ssd and not commands[0].from_dram


def test_a_full_ssd_drops_the_oldest_and_spares_what_a_job_waits_for() -> None:
    index = holding(
        item("new", size=95, used=9),
        item("awaited", size=40, where="ssd"),
        item("idle", size=50, where="ssd", used=1),
    )
    wait(index, "awaited")
    commands = plan(index, Capacity(dram_bytes=100, ssd_bytes=140), now_s=10)
    assert said(commands) == ["drop idle", "evict new", "fetch awaited"]


@pytest.mark.parametrize(
    "capacity", [Capacity(dram_bytes=100, ssd_bytes=0), replace(ROOM, is_ssd_writable=False)]
)
def test_without_an_ssd_to_write_to_victims_are_dropped(capacity: Capacity) -> None:
    index = holding(item("a", size=50, used=1), item("b", size=45, used=2))
    (command,) = plan(index, capacity, now_s=3)
    assert said((command,)) == ["drop a"] and command.from_dram


def test_expired_items_go_from_both_tiers_unless_a_job_waits_or_runs() -> None:
    index = holding(
        *(item(name, size=1, where="dram+ssd", ttl=10) for name in ("idle", "queued", "runs", "leased"))
    )
    index.put(replace(item("leased", size=1, where="dram+ssd", ttl=10), pinned=True))
    wait(index, "runs", "queued")
    index.start("job 0")
    (command,) = plan(index, ROOM, now_s=10)
    assert said((command,)) == ["drop idle"] and command.from_dram and command.from_ssd
    apply(index, (command,))
    index.finish("job 0")
    index.dequeue("job 1")
    assert said(plan(index, ROOM, now_s=10)) == ["drop queued", "drop runs"]


def test_an_item_larger_than_the_window_is_left_to_its_reader_and_holds_nobody_up() -> None:
    index = holding(item("huge", size=90, where="ssd"), item("b", size=10, where="ssd"))
    wait(index, "huge b")
    assert said(plan(index, ROOM, now_s=0)) == ["fetch b"]


def test_the_end_of_a_chain_goes_before_its_beginning() -> None:
    index = holding(
        *(replace(item(f"run{depth}", size=10), depth=depth) for depth in (1, 0, 2)), item("x", size=65)
    )
    index.put(replace(item("x", size=65), pinned=True))
    assert said(plan(index, ROOM, now_s=0)) == ["evict run2"]


def test_a_predicted_return_is_worth_more_than_none_and_less_than_a_nearer_job() -> None:
    index = holding(
        replace(item("soon", size=30), return_s=5.0),
        item("never", size=30, used=9),
        item("z", size=70, where="ssd"),
    )
    wait(index, "z")
    assert said(plan(index, ROOM, now_s=9)) == ["evict never", "evict soon", "fetch z"]
    index.dequeue("job 0")
    index.enqueue(QueuedJob(job_id="later", use_s=6.0, item_ids=("z",)))
    assert plan(index, ROOM, now_s=0) == ()


def test_copies_in_flight_hold_their_room_and_are_left_alone() -> None:
    index = holding(item("a", size=50, used=1), item("b", size=45, used=2))
    index.put(replace(item("a", size=50, used=1), state=State.EVICTING))
    assert (index.dram_bytes, index.ssd_bytes, index.draining_bytes) == (95, 50, 50)
    assert plan(index, ROOM, now_s=3) == ()  # 55 will be free
    index.put(replace(item("a", size=50, where="ssd"), state=State.FETCHING))
    assert (index.dram_bytes, index.ssd_bytes, index.draining_bytes) == (95, 50, 0)
    assert said(plan(index, ROOM, now_s=3)) == ["evict b"]


def test_following_a_queue_keeps_the_keys_of_jobs_that_keep_their_place() -> None:
    index = holding(*(item(name) for name in "abc"))
    jobs = [QueuedJob(job_id=name, use_s=10.0 * place, item_ids=(name,)) for place, name in enumerate("abc")]
    index.follow(jobs, now_s=0)
    before = list(index.jobs)
    index.follow([replace(job, use_s=job.use_s + 0.9) for job in jobs], now_s=0)
    assert list(index.jobs) == before
    index.follow([jobs[2], jobs[0]], now_s=0)  # c was promoted, b left
    assert not index.is_queued("b")
    assert index.next_use_s("a") >= index.next_use_s("c")
    assert [index.record(key[3]).item.item_id for key in index.dram_victims] == ["c", "a", "b"]
