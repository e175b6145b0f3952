"""The tier simulation: bytes stay within the tiers, tokens add up, and looking ahead pays where jobs wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.kv_tiering import Capacity
from trireme.simulator.kv_replay import LLAMA_13B_A100, Foresight, Replay, Replayed
from trireme.simulator.kv_tiers import (
    FIFO,
    LOOK_AHEAD,
    LRU,
    UNGUARDED,
    KvTiers,
    Part,
    TierPolicy,
    TierSpec,
)
from trireme.simulator.kv_turns import TurnTrace, as_turns, linked, sharegpt_like
from trireme.simulator.requests import Request

POLICIES = (LOOK_AHEAD, LRU, FIFO, UNGUARDED)
SPEC = TierSpec(
    capacity=Capacity(dram_bytes=100, ssd_bytes=1000), disk_read_bytes_s=10.0, disk_write_bytes_s=10.0
)


def request(number: int, *blocks: int, arrival_s: float = 0.0, prompt: int | None = None) -> Request:
    runs = tuple((block, 1) for block in blocks)
    tokens = 10 * len(blocks) if prompt is None else prompt
    return Request(f"r{number}", arrival_s, tokens, 5, block_runs=runs, block_tokens=10)


def settle(tiers: KvTiers) -> list[str]:
    ready: list[str] = []
    while tiers.next_event_s() < float("inf"):
        ready += tiers.advance(tiers.next_event_s())
    return ready


def saved(*parts: Part, spec: TierSpec = SPEC, policy: TierPolicy = LOOK_AHEAD) -> KvTiers:
    tiers = KvTiers(spec, policy)
    for number, part in enumerate(parts):
        tiers.finish(f"job {number}", [part], now_s=float(number))
    return tiers


def test_a_job_in_the_queue_has_its_kv_brought_to_dram_before_it_starts() -> None:
    tiers = saved((1, 40), (2, 40), (3, 15))
    settle(tiers)
    first = tiers.index.get(1)
    assert first is not None and first.on_ssd and not first.in_dram  # the oldest had to go
    tiers.enqueue("next", [(1, 40)], use_s=100.0, now_s=50.0)
    settle(tiers)
    found = tiers.start("next", [(1, 40)], now_s=100.0)
    assert (found.dram_bytes, found.ssd_bytes, found.is_ready) == (40, 0, True)
    assert (tiers.counters.ahead_read_bytes, tiers.counters.demand_read_bytes) == (40, 0)


def test_without_a_queue_the_job_waits_for_the_disk_as_long_as_the_disk_needs() -> None:
    tiers = saved((1, 40), (2, 40), (3, 15), policy=LRU)
    settle(tiers)
    found = tiers.start("next", [(1, 40)], now_s=100.0)
    assert (found.dram_bytes, found.ssd_bytes, found.is_ready) == (0, 40, False)
    assert tiers.next_event_s() == pytest.approx(104.0)
    assert tiers.advance(103.9) == []
    assert tiers.advance(104.0) == ["next"]
    assert tiers.counters.demand_read_bytes == 40


def test_two_jobs_that_start_with_one_item_read_it_once() -> None:
    tiers = saved((1, 40), (2, 40), (3, 15), policy=LRU)
    settle(tiers)
    tiers.start("a", [(1, 40)], now_s=100.0)
    tiers.start("b", [(1, 40)], now_s=101.0)
    assert tiers.advance(104.0) == ["a", "b"]
    assert tiers.counters.demand_read_bytes == 40


def test_a_chain_counts_up_to_the_first_part_that_is_gone() -> None:
    tiers = saved((1, 10), (3, 10))
    assert tiers.start("next", [(1, 10), (2, 10), (3, 10)], now_s=5.0).dram_bytes == 10


def test_what_dram_has_no_room_for_waits_in_the_write_buffer_and_beyond_it_is_not_stored() -> None:
    tiers = KvTiers(replace(SPEC, write_buffer_bytes=60))
    tiers.finish("job", [(1, 60), (2, 60), (3, 60)], now_s=0.0)
    assert 1 in tiers.index and 2 not in tiers.index
    assert tiers.counters.unsaved_bytes == 60  # the third
    settle(tiers)
    assert 2 in tiers.index


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    policy=st.sampled_from(POLICIES),
    dram=st.integers(20, 200),
    ssd=st.sampled_from((0, 60, 400)),
)
def test_no_tier_ever_holds_more_than_it_can_whatever_is_asked(
    data: st.DataObject, policy: TierPolicy, dram: int, ssd: int
) -> None:
    spec = TierSpec(
        capacity=Capacity(dram_bytes=dram, ssd_bytes=ssd),
        disk_read_bytes_s=10.0,
        disk_write_bytes_s=5.0,
        write_buffer_bytes=30,
        ttl_s=40.0,
    )
    tiers = KvTiers(spec, policy)
    size = [5 + 7 * (item % 5) for item in range(12)]
    waiting: dict[str, list[Part]] = {}
    held: dict[str, list[Part]] = {}
    loading: set[str] = set()
    now_s = 0.0
    for step in range(data.draw(st.integers(1, 50))):
        now_s += data.draw(st.sampled_from((0.0, 0.5, 3.0, 20.0)))
        loading.difference_update(tiers.advance(now_s))
        chain = [
            (item, size[item]) for item in data.draw(st.lists(st.integers(0, 11), max_size=4, unique=True))
        ]
        match data.draw(st.sampled_from(("enqueue", "start", "release", "finish"))):
            case "enqueue":
                waiting[f"j{step}"] = chain
                tiers.enqueue(f"j{step}", chain, use_s=now_s + step % 7, now_s=now_s)
            case "start" if waiting:
                job_id = min(waiting)
                held[job_id] = waiting.pop(job_id)
                if not tiers.start(job_id, held[job_id], now_s=now_s).is_ready:
                    loading.add(job_id)
            case "release" if held.keys() - loading:
                job_id = min(held.keys() - loading)
                tiers.release(job_id, now_s=now_s)
                tiers.finish(job_id, held.pop(job_id), now_s=now_s)
            case _:
                tiers.finish(f"other {step}", chain, now_s=now_s)
        assert tiers.counters.most_dram_bytes <= dram
        assert tiers.counters.most_ssd_bytes <= ssd
    copies = 0
    while tiers.next_event_s() < float("inf") and copies < 500:
        loading.difference_update(tiers.advance(tiers.next_event_s()))
        copies += 1
    assert not loading
    # Without the guards, fetching and evicting may chase each other for ever.
    assert copies < 500 or policy is UNGUARDED


def test_items_are_what_all_requests_use_wholly_or_not_at_all() -> None:
    trace = as_turns([request(0, 1, 2, 3, 4), request(1, 1, 2, 9), request(2, 1, 2, 3, 4, 5)])
    tokens = [sum(trace.item_tokens[item] for item in turn.chain) for turn in trace.turns]
    assert tokens == [40, 30, 50]
    assert trace.turns[0].chain == trace.turns[2].chain[:-1]
    shared = set(trace.turns[0].chain) & set(trace.turns[1].chain)
    assert sum(trace.item_tokens[item] for item in shared) == 20
    assert trace.total_tokens == 60
    assert all(
        [turn for turn, each in enumerate(trace.turns) if item in each.chain] == list(users)
        for item, users in enumerate(trace.users)
    )


def test_a_turn_is_linked_to_the_turn_it_continues_not_to_all_who_share_the_system_prompt() -> None:
    requests = [
        request(0, 1, 2, 3),
        request(1, 1, 7, 8, arrival_s=1.0),
        request(2, 1, 2, 3, 4, arrival_s=9.0),
        request(3, 1, 5, arrival_s=10.0),
    ]
    found = linked(requests)
    assert [(turn.after, turn.think_s) for turn in found] == [("", 0.0), ("", 0.0), ("r0", 9.0), ("", 0.0)]


def test_the_generator_has_the_turn_counts_it_promises() -> None:
    trace = sharegpt_like(sessions=4000, sessions_per_s=1.0, think_s=30.0, seed=3, longest_tokens=10**6)
    turns: dict[str, int] = {}
    for turn in trace.turns:
        turns[turn.request.session_id] = turns.get(turn.request.session_id, 0) + 1
    single = sum(count == 1 for count in turns.values()) / len(turns)
    assert single == pytest.approx(0.27, abs=0.03)
    assert sum(turns.values()) / len(turns) == pytest.approx(5.75, rel=0.05)


MACHINE = replace(LLAMA_13B_A100, slots=24)


def quarter_on_ssd(trace: TurnTrace) -> TierSpec:
    ssd_bytes = trace.total_tokens * MACHINE.kv_bytes_per_token // 4
    return TierSpec(
        capacity=Capacity(dram_bytes=ssd_bytes // 10, ssd_bytes=ssd_bytes),
        disk_read_bytes_s=5e9,
        disk_write_bytes_s=5e9,
        write_buffer_bytes=8 << 30,
    )


def replayed(policy: TierPolicy | None, trace: TurnTrace) -> Replayed:
    tiers = KvTiers(quarter_on_ssd(trace), policy) if policy else None
    return Replay(trace, MACHINE, tiers).run()


def hit_tokens(result: Replayed) -> int:
    return sum(turn.hit_tokens for turn in result.turns)


def test_tokens_from_the_store_and_tokens_computed_are_the_prompts() -> None:
    trace = sharegpt_like(sessions=60, sessions_per_s=2.0, think_s=10.0, seed=5)
    prompts = sum(turn.request.prompt_tokens for turn in trace.turns)
    assert replayed(None, trace).prefill_tokens == prompts
    for policy in POLICIES:
        result = replayed(policy, trace)
        full_hits = sum(
            turn.hit_tokens == each.request.prompt_tokens
            for turn, each in zip(result.turns, trace.turns, strict=True)
        )
        assert result.prefill_tokens + hit_tokens(result) - full_hits == prompts
        assert all(turn.hit_tokens <= turn.reusable_tokens for turn in result.turns)
        assert all(turn.arrival_s <= turn.start_s < turn.first_token_s for turn in result.turns)


def test_with_a_queue_looking_ahead_finds_more_and_finds_it_in_dram() -> None:
    trace = sharegpt_like(sessions=350, sessions_per_s=2.0, think_s=10.0, seed=1)
    ahead, lru = replayed(LOOK_AHEAD, trace), replayed(LRU, trace)
    assert sum(turn.depth for turn in lru.turns) / len(lru.turns) > 20
    assert hit_tokens(ahead) > 1.2 * hit_tokens(lru)
    assert sum(turn.dram_tokens for turn in ahead.turns) > 8 * sum(turn.dram_tokens for turn in lru.turns)


def test_knowing_the_future_is_an_upper_bound() -> None:
    trace = sharegpt_like(sessions=200, sessions_per_s=1.0, think_s=100.0, seed=2)
    foresight = Foresight(trace)
    tiers = KvTiers(quarter_on_ssd(trace), return_s=foresight.return_s)
    oracle = Replay(trace, MACHINE, tiers, foresight=foresight).run()
    assert hit_tokens(oracle) > hit_tokens(replayed(LOOK_AHEAD, trace))


def test_equal_inputs_give_equal_results() -> None:
    trace = sharegpt_like(sessions=40, sessions_per_s=2.0, think_s=10.0, seed=9)
    assert replayed(LOOK_AHEAD, trace).turns == replayed(LOOK_AHEAD, trace).turns
