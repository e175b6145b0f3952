"""The simulated fleet: exact where mathematics or a plain loop says what must come out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.schedulers import POLICIES, make_scheduler
from trireme.simulator import scenario, workloads
from trireme.simulator.engine_config import EngineConfig, Swapping
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.fleet import Fleet, FleetConfig
from trireme.simulator.requests import Request, on_tick
from trireme.simulator.result import Result

SECOND_PER_TOKEN = EngineModel(name="second per token", knot_tokens=(1, 4), knot_s=(1.0, 4.0))
FLAT = EngineModel(name="flat", knot_tokens=(1,), knot_s=(0.125,))
REAL = EngineModel(
    name="like a small GPU",
    knot_tokens=(1, 32, 256),
    knot_s=(0.004, 0.005, 0.02),
    per_sequence_s=1e-4,
    per_kv_token_s=1e-6,
    per_pair_s=1e-7,
    kv_bytes_per_token=1000,
    link_bytes_per_s=4e6,
)


def play(
    requests: list[Request],
    policy: str = "fcfs",
    *,
    model: EngineModel = REAL,
    workers: int = 1,
    queue_limit: int | None = None,
    mlfq: MlfqSettings | None = None,
    **engine: object,
) -> Result:
    config = FleetConfig(
        workers=workers,
        queue_limit=queue_limit,
        engine=EngineConfig(**engine),  # type: ignore[arg-type]
    )
    return scenario.simulate(requests, config, model, policy, settings=mlfq)


@pytest.mark.parametrize(
    "policy, finish_s",
    [("fcfs", (4, 6, 7)), ("naive", (7, 5, 6)), ("mlfq", (7, 2, 3)), ("srpt", (7, 3, 1))],
)
def test_the_three_jobs_of_the_design_end_when_it_says(policy: str, finish_s: tuple[float, ...]) -> None:
    jobs = [Request("J1", 0.0, 3, 2), Request("J2", 0.0, 1, 2), Request("J3", 0.0, 1, 1)]
    result = play(jobs, policy, model=SECOND_PER_TOKEN, max_sequences=1, token_budget=4)
    assert tuple(result.finish_s) == finish_s


@pytest.mark.parametrize("answers", ["fixed", "geometric"])
def test_the_mean_wait_of_a_single_server_is_that_of_pollaczek_and_khinchine(answers: str) -> None:
    """One sequence at a time, an eighth of a second per token: M/D/1 and M/G/1."""
    rng = np.random.default_rng(5)
    count = 12_000
    lengths = np.full(count, 2) if answers == "fixed" else rng.geometric(0.5, count)
    arrivals = np.cumsum(rng.exponential(0.25 / 0.6, count))
    requests = [Request(f"{i}", on_tick(arrivals[i]), 1, int(lengths[i])) for i in range(count)]
    result = play(requests, model=FLAT, max_sequences=1, token_budget=1)
    service_s = 0.125 * lengths
    wait_s = result.jct_s - service_s
    rate = count / arrivals[-1]
    expected_s = rate * (service_s**2).mean() / (2 * (1 - rate * service_s.mean()))
    assert wait_s.min() >= -1e-6
    assert wait_s.mean() == pytest.approx(expected_s, rel=0.08)


def reference_fcfs(
    requests: list[Request], model: EngineModel, *, max_sequences: int, token_budget: int
) -> list[tuple[float, float]]:
    """First and last token of each request by a plain loop over iterations; blocks never lack."""
    now_s = 0.0
    waiting = list(requests)
    running: list[dict[str, int]] = []
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while waiting or running:
        if not running and waiting[0].arrival_s > now_s:
            now_s = waiting[0].arrival_s
        tokens = token_budget
        batch: list[tuple[dict[str, int], int]] = []
        for job in running:
            if job["target"] - job["computed"] == 1 and tokens:
                batch.append((job, 1))
                tokens -= 1
        for job in running:
            needed = job["target"] - job["computed"]
            if needed > 1 and tokens:
                batch.append((job, min(needed, tokens)))
                tokens -= batch[-1][1]
        while waiting and waiting[0].arrival_s <= now_s and len(running) < max_sequences and tokens:
            request = waiting.pop(0)
            job = {
                "index": requests.index(request),
                "target": request.prompt_tokens,
                "computed": 0,
                "left": request.answer_tokens,
            }
            running.append(job)
            batch.append((job, min(request.prompt_tokens, tokens)))
            tokens -= batch[-1][1]
        now_s += model.iteration_s(
            len(batch),
            sum(count for _, count in batch),
            sum(job["computed"] + count for job, count in batch),
            sum(count * job["computed"] + count * (count + 1) // 2 for job, count in batch),
        )
        for job, count in batch:
            job["computed"] += count
            if job["computed"] == job["target"]:
                job["target"] += 1
                job["left"] -= 1
                first.setdefault(job["index"], now_s)
                if not job["left"]:
                    last[job["index"]] = now_s
        running = [job for job in running if job["left"]]
    return [(first[index], last[index]) for index in range(len(requests))]


def small_workload() -> st.SearchStrategy[list[Request]]:
    job = st.tuples(st.integers(0, 400), st.integers(1, 90), st.integers(1, 60))

    def requests(jobs: list[tuple[int, int, int]]) -> list[Request]:
        ordered = sorted(jobs)
        # Arrivals on quarter milliseconds, some of them at the same instant.
        return [Request(f"r{i:02}", at / 4096, p, a) for i, (at, p, a) in enumerate(ordered)]

    return st.lists(job, min_size=1, max_size=14).map(requests)


@given(requests=small_workload(), max_sequences=st.integers(1, 5), extra=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_fcfs_equals_a_plain_loop_over_iterations(
    requests: list[Request], max_sequences: int, extra: int
) -> None:
    budget = max_sequences + extra
    result = play(requests, max_sequences=max_sequences, token_budget=budget)
    expected = reference_fcfs(requests, REAL, max_sequences=max_sequences, token_budget=budget)
    assert list(zip(result.first_token_s, result.finish_s, strict=True)) == expected


@given(
    requests=small_workload(),
    policy=st.sampled_from(POLICIES),
    num_blocks=st.integers(10, 40),
    host_blocks=st.sampled_from([0, 0, 15, 200]),
    max_sequences=st.integers(1, 6),
    swapping=st.sampled_from(Swapping),
    workers=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_playing_many_iterations_at_once_changes_no_bit_and_loses_no_block(
    requests: list[Request],
    policy: str,
    num_blocks: int,
    host_blocks: int,
    max_sequences: int,
    swapping: Swapping,
    workers: int,
) -> None:
    config = FleetConfig(
        workers=workers,
        engine=EngineConfig(
            num_blocks=num_blocks,
            host_blocks=host_blocks,
            max_sequences=max_sequences,
            token_budget=64,
            swapping=swapping,
        ),
    )
    # The reserve that proactive swapping keeps is estimated anew now and then, in between too.
    assume(swapping is not Swapping.PROACTIVE or not host_blocks)
    mlfq = MlfqSettings(alpha_s=0.3, promote_period=5, proactive=swapping is Swapping.PROACTIVE)

    def run(fast_forward: bool) -> Result:
        engine = replace(config.engine, fast_forward=fast_forward)
        fleet = Fleet(
            requests,
            replace(config, engine=engine),
            REAL,
            lambda remaining_s: make_scheduler(policy, REAL.profile(), settings=mlfq, remaining=remaining_s),
        )
        result = fleet.run()
        for one in fleet.engines:
            assert not one.sequences
            assert (one.pools.device_free, one.pools.device_draining) == (num_blocks, 0)
            assert one.pools.host_free == host_blocks
        return result

    stepwise, at_once = run(False), run(True)
    for name in ("arrival_s", "first_token_s", "finish_s", "preemptions", "recomputed_tokens"):
        assert getattr(stepwise, name).tolist() == getattr(at_once, name).tolist()
    assert stepwise.counters.iterations == at_once.counters.iterations
    assert stepwise.counters.busy_s == at_once.counters.busy_s
    assert (stepwise.finish_s >= stepwise.first_token_s).all()
    assert (stepwise.first_token_s > stepwise.arrival_s).all()


def heavy(policy: str, swapping: Swapping, *, fast_forward: bool = True, host_blocks: int = 4000) -> Result:
    """More KV than the device has room for."""
    lengths = workloads.LognormalMix(
        prompt_mean=60, prompt_sigma=0.8, answer_mean=80, answer_sigma=1.0, longest=400
    )
    requests = workloads.generate(count=150, rate_rps=12.0, lengths=lengths, seed=4)
    return play(
        requests,
        policy,
        num_blocks=60,
        host_blocks=0 if swapping is Swapping.RECOMPUTE else host_blocks,
        max_sequences=6,
        token_budget=256,
        swapping=swapping,
        fast_forward=fast_forward,
    )


@pytest.mark.parametrize("policy", ["mlfq", "srpt"])
def test_swapped_sequences_come_back_and_nothing_is_computed_twice(policy: str) -> None:
    stepwise, at_once = (heavy(policy, Swapping.PROACTIVE, fast_forward=fast) for fast in (False, True))
    counters = at_once.counters
    assert counters.swapped_out == counters.swapped_in > 20
    assert counters.decisions < 0.9 * stepwise.counters.decisions
    assert at_once.recomputed_tokens.sum() == counters.evicted == 0


def test_copies_on_the_critical_path_stall_and_dropped_kv_is_computed_again() -> None:
    ahead, on_demand, dropped = (heavy("mlfq", swapping) for swapping in Swapping)
    assert on_demand.counters.stalled_s > ahead.counters.stalled_s
    for result in (ahead, on_demand, dropped):
        spent_s = result.counters.busy_s + result.counters.stalled_s + idle_s(result)
        assert result.makespan_s == pytest.approx(spent_s, rel=1e-9)
    assert dropped.counters.swapped_out == 0 < dropped.counters.evicted
    assert dropped.recomputed_tokens.sum() > 0


def idle_s(result: Result) -> float:
    """Time in which no request was there."""
    spans = sorted(zip(result.arrival_s, result.finish_s, strict=True))
    total, end_s = 0.0, spans[0][0]
    for arrival_s, finish_s in spans:
        total += max(0.0, arrival_s - end_s)
        end_s = max(end_s, finish_s)
    return total


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    def run(seed: int) -> list[float]:
        spec = scenario.WorkloadSpec(trace="alpaca-like", requests=80, rate_rps=20.0, seed=seed)
        return play(scenario.workload_of(spec), "mlfq", workers=2, max_sequences=4).finish_s.tolist()

    assert run(1) == run(1) != run(2)


def test_routing_spreads_equal_requests_evenly() -> None:
    requests = [Request(f"{i}", 0.0, 50, 20) for i in range(40)]
    alone = play(requests, max_sequences=4, token_budget=256)
    four = play(requests, workers=4, max_sequences=4, token_budget=256)
    assert four.makespan_s == pytest.approx(alone.makespan_s / 4, rel=0.2)


def test_what_no_worker_has_room_for_waits_in_order_of_arrival() -> None:
    """The policy would run the short ones first, but it sees only what was handed out."""
    requests = [Request(f"{i:02}", 0.0, 40, 40 - i) for i in range(30)]
    free = play(requests, "srpt", max_sequences=2, token_budget=64)
    held = play(requests, "srpt", max_sequences=2, token_budget=64, queue_limit=0, workers=1)
    assert free.finish_s.argmin() > 25
    assert held.finish_s.argmin() < 2


def test_a_closed_session_sends_its_next_turn_after_the_answer() -> None:
    turns = [
        Request("a", 0.0, 10, 30),
        Request("b", 5.0, 10, 3, after="a", think_s=0.5),
        Request("c", 9.0, 10, 3, after="b", think_s=0.25),
    ]
    result = play(turns)
    assert result.arrival_s[1:].tolist() == [result.finish_s[0] + 0.5, result.finish_s[1] + 0.25]


def test_a_fixed_overhead_delays_each_request_by_itself() -> None:
    requests = [Request("a", 1.0, 10, 5)]
    bare = scenario.simulate(requests, FleetConfig(), REAL, "fcfs")
    slow = scenario.simulate(requests, FleetConfig(request_overhead_s=0.5), REAL, "fcfs")
    assert slow.jct_s[0] - bare.jct_s[0] == pytest.approx(0.5, abs=1e-6)


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="needs 7 blocks"):
        play([Request("a", 0.0, 100, 5)], num_blocks=6, block_tokens=16)


@pytest.mark.parametrize(
    "wrong",
    [{"num_blocks": 0}, {"host_blocks": -1}, {"token_budget": 3}, {"watermark": 1.0}, {"block_tokens": 0}],
)
def test_impossible_engines_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfiguration):
        EngineConfig(**wrong)  # type: ignore[arg-type]


def test_impossible_fleets_are_refused() -> None:
    for wrong in ({"workers": 0}, {"queue_limit": -1}, {"request_overhead_s": math.inf}):
        with pytest.raises(InvalidConfiguration):
            FleetConfig(**wrong)  # type: ignore[arg-type]
