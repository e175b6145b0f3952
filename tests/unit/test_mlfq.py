"""Skip-join MLFQ: short jobs first, nothing recomputed, nobody starved; schedules worked out by hand."""

from __future__ import annotations

import math

import pytest

from tests.unit.iteration_support import World, linear_profile
from trireme.errors import InvalidConfiguration
from trireme.policies.iteration import IterationScheduler, Job, Location
from trireme.policies.iteration_profile import IterationProfile, PrefillPoint
from trireme.policies.mlfq import MlfqScheduler, MlfqSettings
from trireme.policies.schedulers import POLICIES, make_scheduler

NEVER = MlfqSettings(alpha_s=math.inf)


def mlfq(**knobs: object) -> MlfqScheduler:
    return MlfqScheduler(linear_profile(), MlfqSettings(**knobs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy, finish_s",
    [("fcfs", (4, 6, 7)), ("naive", (7, 5, 6)), ("mlfq", (7, 2, 3)), ("srpt", (7, 3, 1))],
)
def test_three_jobs_finish_as_worked_out_by_hand(policy: str, finish_s: tuple[int, ...]) -> None:
    worlds: list[World] = []
    scheduler = make_scheduler(
        policy, linear_profile(), settings=NEVER, remaining=lambda name: worlds[0].remaining(name)
    )
    world = World(scheduler, max_sequences=1)
    worlds.append(world)
    world.add("J1", 3, 2, arrival_s=0.0)
    world.add("J2", 1, 2, arrival_s=0.0)
    world.add("J3", 1, 1, arrival_s=0.0)
    if policy == "mlfq":
        assert isinstance(scheduler, MlfqScheduler)
        assert [scheduler.level_of(name) for name in ("J1", "J2", "J3")] == [3, 1, 1]
    world.run()
    assert tuple(world.done[name].finish_s for name in ("J1", "J2", "J3")) == finish_s


def test_a_job_joins_the_first_level_that_covers_its_first_iteration() -> None:
    scheduler = mlfq()
    expected = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 8: 4, 9: 5, 1000: 11}
    for tokens, level in expected.items():
        job = Job(sequence_id=f"{tokens}", arrival_s=0.0, new_tokens=tokens)
        assert f"level {level}:" in scheduler.add(job, now_s=0.0)
        assert scheduler.level_of(f"{tokens}") == level
    stalled = Job(sequence_id="stalled", arrival_s=0.0, new_tokens=1, load_stall_s=6.5)
    scheduler.add(stalled, now_s=0.0)
    assert scheduler.level_of("stalled") == 4
    assert sum(scheduler.level_counts) == 9


@pytest.mark.parametrize("bad", [None, math.nan, -1.0])
def test_without_a_usable_profile_everybody_joins_level_1_and_is_counted(bad: float | None) -> None:
    profile = None if bad is None else IterationProfile((PrefillPoint(8, 0, bad),), ())
    scheduler = MlfqScheduler(profile)
    for name in ("a", "b"):
        reason = scheduler.add(Job(sequence_id=name, arrival_s=0.0, new_tokens=500), now_s=0.0)
        assert "no profile" in reason and scheduler.level_of(name) == 1
    assert scheduler.profile_missing == 2


def test_the_short_run_before_the_long_and_the_long_keeps_its_kv() -> None:
    world = World(mlfq(alpha_s=math.inf), max_sequences=1, token_budget=8)
    world.add("long", 8, 50)
    for _ in range(12):
        world.step()
    world.add("short", 2, 2)
    decision = world.step()
    assert dict(decision.runs) == {"short": 2}
    assert [name for name, _ in decision.paused] == ["long"]
    world.run()
    assert world.done["short"].finish_s == world.done["short"].arrival_s + 3
    assert world.recomputed == 0 and world.copied_out == 0


def test_a_long_prompt_holds_a_short_request_for_no_longer_than_one_chunk() -> None:
    world = World(mlfq(alpha_s=math.inf), max_sequences=4, token_budget=64, device=100_000)
    world.add("long", 100_000, 1)
    for _ in range(20):
        world.step()
    world.add("short", 10, 1)
    decision = world.step()
    assert dict(decision.runs) == {"short": 10, "long": 54}
    assert "short" in world.done
    assert not world.changes


@pytest.mark.parametrize("neighbours", [0, 3])
def test_a_chunked_prompt_is_not_demoted_for_its_own_prefill(neighbours: int) -> None:
    scheduler = mlfq(alpha_s=math.inf)
    world = World(scheduler, max_sequences=4, token_budget=16)
    for index in range(neighbours):
        world.add(f"n{index}", 4, 500)
    world.add("long", 500, 3)
    level = scheduler.level_of("long")
    while world.sequences["long"].answered == 0:
        world.step()
        assert scheduler.level_of("long") == level
    for _ in range(600):
        if "long" in world.sequences:
            world.step()
    assert "long" in world.done


def test_naive_mlfq_demotes_for_the_prefill() -> None:
    scheduler = mlfq(skip_join=False)
    world = World(scheduler, max_sequences=1)
    world.add("long", 9, 5)
    world.step()
    assert scheduler.level_of("long") == 2
    assert world.changes[0].reason == "it used 9000.0 ms of the 1000.0 ms of level 1"


def test_who_used_up_the_quantum_goes_to_the_tail_below_and_who_did_not_stays_in_front() -> None:
    scheduler = mlfq(alpha_s=math.inf)
    world = World(scheduler, max_sequences=1)
    world.add("a", 2, 9)
    world.add("b", 2, 9)
    names: list[str] = []
    for _ in range(10):
        (run,) = world.step().runs
        names.append(run.sequence_id)
    # Level 2: a prefill, which its level has paid for, then three decodes spend the quantum of 2 s; so does
    # b; at level 3 each runs for 5.
    assert names == ["a", "a", "a", "a", "b", "b", "b", "b", "a", "a"]
    assert [scheduler.level_of(name) for name in "ab"] == [3, 3]
    assert [change[:3] for change in world.changes] == [("a", 2, 3), ("b", 2, 3)]


def test_eta_2_goes_two_levels_down_and_the_last_level_is_for_ever() -> None:
    scheduler = mlfq(eta=2, levels=4, alpha_s=math.inf)
    world = World(scheduler, max_sequences=1)
    world.add("a", 1, 60)
    world.run()
    assert [(old, new) for _, old, new, _ in world.changes] == [(1, 3), (3, 4)]


def test_a_stall_is_charged_as_at_most_four_times_the_profiled_time() -> None:
    def cost(world: World, runs: object) -> float:
        return 1000.0 if world.now_s == 6.0 else 1.0

    scheduler = mlfq(alpha_s=math.inf, quantum_s=6.0)
    world = World(scheduler, max_sequences=2, cost=cost)
    world.add("a", 1, 60)
    world.add("b", 1, 60)
    for _ in range(6):
        world.step()
    world.step()
    assert world.now_s == 1006.0
    assert [change[:3] for change in world.changes] == [("a", 1, 2), ("b", 1, 2)]
    assert "it used 9000.0 ms" in world.changes[0].reason


def starve(**knobs: object) -> World:
    """A long job that an endless stream of short ones keeps from running."""
    world = World(mlfq(**knobs), max_sequences=1)
    world.add("long", 20, 40)
    for number in range(400):
        if "long" not in world.sequences:
            break
        world.add(f"s{number}", 1, 1)
        world.step()
        world.promotions += [number for _ in world.decisions[-1].promoted]
    return world


def test_a_starving_job_is_promoted_and_without_promotion_it_starves() -> None:
    assert starve(alpha_s=math.inf).sequences["long"].computed == 0
    world = starve(alpha_s=3.0)
    assert world.promotions
    promoted = [change for decision in world.decisions for change in decision.promoted]
    assert promoted[0][:3] == ("long", 6, 1)
    assert "it waited" in promoted[0].reason and "promoted long" in next(
        decision.reason for decision in world.decisions if decision.promoted
    )
    assert world.sequences["long"].computed > 20


def test_promotions_keep_their_rate() -> None:
    world = World(mlfq(alpha_s=3.0, promote_period=20, promote_max=2), max_sequences=1)
    for number in range(30):
        world.add(f"long{number}", 20, 40)
    for number in range(300):
        world.add(f"s{number}", 1, 1)
        world.step()
        world.promotions += [number for _ in world.decisions[-1].promoted]
    assert len(world.promotions) >= 20
    for start in range(300):
        assert sum(start <= number < start + 20 for number in world.promotions) <= 2


def test_a_promoted_prompt_holds_level_1_for_one_chunk() -> None:
    scheduler = mlfq(alpha_s=3.0)
    world = World(scheduler, max_sequences=1, token_budget=8)
    world.add("long", 400, 2)
    number = 0
    while not any(decision.promoted for decision in world.decisions):
        world.add(f"s{number}", 1, 1)
        world.step()
        number += 1
    assert dict(world.decisions[-1].runs) == {"long": 8}
    assert scheduler.level_of("long") == 2
    assert "long" not in dict(world.step().runs)


def test_a_promotion_waits_until_its_kv_can_come_back() -> None:
    scheduler = mlfq(alpha_s=3.0)
    world = World(scheduler, max_sequences=1, device=30, token_budget=64)
    world.add("big", 60, 40)
    for _ in range(2):
        world.step()
    for number in range(200):
        world.add(f"s{number}", 40, 2)
        before = {name: world.view(name) for name in world.sequences}
        free = world.free + world.draining
        decision = world.step()
        for change in decision.promoted:
            seen = before[change.sequence_id]
            assert seen.location is not Location.HOST or seen.num_blocks <= free
    promoted = {change.sequence_id for decision in world.decisions for change in decision.promoted}
    assert promoted


def test_swapped_out_by_need_and_brought_back_in_time_and_nothing_is_computed_twice() -> None:
    world = World(mlfq(alpha_s=math.inf), max_sequences=2, device=24, host=400, token_budget=64)
    for index in range(4):
        world.add(f"long{index}", 32, 30)
        for _ in range(8):
            world.step()
    assert world.copied_out > 0
    world.run()
    assert world.recomputed == 0
    assert any(decision.swap_in for decision in world.decisions)


def test_with_room_for_all_nothing_is_ever_copied() -> None:
    world = World(mlfq(), max_sequences=3, device=100_000, token_budget=64)
    for number in range(40):
        world.add(f"{number}", 1 + 7 * number % 50, 1 + 5 * number % 30)
        world.step()
    world.run()
    assert world.copied_out == 0 and not any(decision.swap_in for decision in world.decisions)


def test_with_one_endless_quantum_it_is_first_come_first_served() -> None:
    runs = []
    for scheduler in (mlfq(quantum_s=1e6, alpha_s=math.inf), make_scheduler("fcfs")):
        world = World(scheduler, max_sequences=3, token_budget=16, max_passes=0)
        for number in range(30):
            world.add(f"{number:02}", 1 + 11 * number % 40, 1 + 5 * number % 12)
            world.step()
        world.run()
        runs.append([dict(decision.runs) for decision in world.decisions])
    assert runs[0] == runs[1]


def test_a_full_host_stops_new_prompts_but_not_those_that_run() -> None:
    world = World(mlfq(alpha_s=math.inf), max_sequences=2, device=24, host=60, token_budget=64)
    waited = 0
    for index in range(40):
        world.add(f"{index}", 8, 20)
        for _ in range(6):
            world.step()
            waited += world.host_free < 6 and not world.decisions[-1].admitted
    assert waited
    world.run()
    assert world.recomputed == 0


def test_without_a_host_a_victim_is_computed_again_and_all_end() -> None:
    world = World(mlfq(alpha_s=math.inf), max_sequences=4, device=24, host=0, token_budget=64)
    for index in range(6):
        world.add(f"{index}", 20, 40)
        world.step()
    world.run()
    assert any(decision.evicted for decision in world.decisions) and world.recomputed > 0


def test_kv_that_was_lost_is_computed_again_at_the_same_level() -> None:
    scheduler = mlfq(alpha_s=math.inf)
    world = World(scheduler, max_sequences=1, token_budget=64)
    world.add("a", 8, 20)
    for _ in range(6):
        world.step()
    level = scheduler.level_of("a")
    lost = world.sequences["a"]
    world.free += lost.blocks
    lost.location, lost.blocks, lost.computed = Location.NONE, 0, 0
    decision = world.step()
    assert decision.admitted == {"a"} and dict(decision.runs) == {"a": 14}
    assert scheduler.level_of("a") == level
    world.run()


def test_a_shared_block_is_computed_once_and_waited_for_but_not_for_ever() -> None:
    world = World(mlfq(alpha_s=math.inf), token_budget=16, max_sequences=8, max_passes=3)
    for name in ("first", "second"):
        world.add(name, 100, 1)
        world.sequences[name].next_block = b"same"
    world.add("other", 101, 1)
    assert world.step().admitted == {"first"}
    admitted = [world.step().admitted for _ in range(4)]
    assert set().union(*admitted) <= {"second", "other"}
    world.run()


def test_order_is_the_real_order_and_next_use_follows_it() -> None:
    scheduler = mlfq(alpha_s=math.inf)
    world = World(scheduler, max_sequences=1)
    for name, prompt in [("c", 9), ("a", 1), ("d", 9), ("b", 2)]:
        world.add(name, prompt, 5)
    assert list(scheduler.order()) == ["a", "b", "c", "d"]
    world.step()
    assert list(scheduler.order()) == ["b", "c", "d"]
    times = [scheduler.next_use_s(name, now_s=world.now_s) for name in "abcd"]
    assert times[0] == 0.0 and times == sorted(times) and times[1] == 1.0
    assert scheduler.next_use_s("nobody", now_s=0.0) == math.inf


def test_quanta_follow_the_profile_and_levels_stay() -> None:
    scheduler = mlfq()
    scheduler.add(Job(sequence_id="a", arrival_s=0.0, new_tokens=8), now_s=0.0)
    assert scheduler.quanta_s[1:4] == (1.0, 2.0, 4.0)
    scheduler.use_profile(linear_profile().scaled(0.5))
    assert scheduler.quanta_s[1:4] == (2.0, 4.0, 8.0) and scheduler.level_of("a") == 4
    scheduler.add(Job(sequence_id="b", arrival_s=0.0, new_tokens=8), now_s=0.0)
    assert scheduler.level_of("b") == 4


@pytest.mark.parametrize(
    "knobs",
    [
        {"levels": 0},
        {"eta": 0},
        {"alpha_s": math.nan},
        {"quantum_s": 0.0},
        {"promote_max": -1},
        {"spike": math.inf},
        {"promote_period": 0},
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(InvalidConfiguration):
        MlfqSettings(**knobs)  # type: ignore[arg-type]


def test_alpha_follows_the_objective() -> None:
    assert MlfqSettings().starving_s == 3.0
    assert MlfqSettings(slo_per_token_s=0.5).starving_s == 5.0
    assert MlfqSettings(slo_per_token_s=0.5, alpha_s=0.3).starving_s == 0.3


def test_every_policy_has_a_name() -> None:
    for policy in POLICIES:
        scheduler: IterationScheduler = make_scheduler(policy, remaining=lambda name: 1.0)
        world = World(scheduler, max_sequences=2)
        for number in range(5):
            world.add(f"{number}", 3, 2)
        world.run()
        assert len(world.done) == 5
    with pytest.raises(InvalidConfiguration):
        make_scheduler("srpt")
    with pytest.raises(InvalidConfiguration):
        make_scheduler("lottery")


def test_a_crowd_that_waits_moves_out_no_more_than_one_batch_needs() -> None:
    worlds: list[World] = []
    scheduler = make_scheduler("srpt", remaining=lambda name: worlds[0].remaining(name))
    world = World(scheduler, max_sequences=2, device=108, token_budget=64)
    worlds.append(world)
    for number in range(50):
        world.add(f"holder{number:02}", 12, 300 - 4 * number)
        world.step()
    for number in range(12):
        world.add(f"short{number:02}", 56, 1)
    out = [len(world.step().swap_out) for _ in range(3)]
    assert 0 < max(out) <= 12, out
