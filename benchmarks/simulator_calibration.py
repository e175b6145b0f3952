"""The simulator against the fleet: the same small trace through both on this machine.

    python -m benchmarks.iteration_profile && python -m benchmarks.simulator_calibration [--policy fcfs,mlfq]

The engine's iterations come from the measured profile. What the fleet adds to them is not in it: the
engine shares the cores with gateway, scheduler and client. That is measured on probes that are not the
trace: a backlog of equal requests tells how much longer iterations take (a factor), and lone requests of one
token tell the time of a request outside the engine. They run once before and once after the trace, since a
machine's speed drifts: the mean counts, and where the two differ by more than a tenth the machine did
something else, and the run does not count. In between the trace is played: 150 requests with Poisson
arrivals and the lengths of the Azure conversation trace, cut to what a small model can do. The bar: mean and
p99 of the completion time within 15 % of the fleet's, at the median of the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet import MODEL, RESULTS, fleet_document, running, write_result
from trireme.load.drivers import Driver, grpc_driver
from trireme.load.plan import Lengths, PlannedRequest, closed
from trireme.load.report import percentile
from trireme.load.run import run_closed_loop, run_open_loop
from trireme.simulator import scenario
from trireme.simulator.engine_config import EngineConfig
from trireme.simulator.engine_model import EngineModel, from_file
from trireme.simulator.fleet import FleetConfig
from trireme.simulator.requests import Request

VOCABULARY = 4000
MAX_SEQUENCES = 8
TOKEN_BUDGET = 256
KV_MIB = 256
PROMPT_FACTOR = 0.125
ANSWER_FACTOR = 0.25
PROBE_REQUESTS = 64
PROBE_PROMPT = 96
PROBE_ANSWER = 32
BAR = 0.15
DRIFT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What the fleet adds to the engine's own times."""

    factor: float
    per_request_s: float


async def probe(driver: Driver, model: EngineModel, policy: str, *, seed: int) -> Overhead:
    """Measure the fleet's overhead with loads that are unlike the trace.

    Each time with another seed: prompts that were asked before would be found.
    """
    lengths = Lengths(prompt_tokens=PROBE_PROMPT, answer_tokens=PROBE_ANSWER)
    plan = closed(count=PROBE_REQUESTS, lengths=lengths, vocabulary=VOCABULARY, seed=seed)
    live = await run_closed_loop(plan, driver, concurrency=PROBE_REQUESTS)
    backlog = [
        Request(request_id=str(n), arrival_s=0.0, prompt_tokens=PROBE_PROMPT, answer_tokens=PROBE_ANSWER)
        for n in range(PROBE_REQUESTS)
    ]
    factor = live.duration_s / max(simulated(backlog, model, Overhead(factor=1.0, per_request_s=0.0), policy))
    lengths = Lengths(prompt_tokens=PROBE_PROMPT, answer_tokens=1)
    lone = closed(count=30, lengths=lengths, vocabulary=VOCABULARY, seed=seed + 1)
    alone = await run_closed_loop(lone, driver, concurrency=1)
    prefill_s = factor * model.prefill_s(PROBE_PROMPT)
    outside_s = statistics.median(outcome.e2e_s for outcome in alone.outcomes) - prefill_s
    return Overhead(factor=factor, per_request_s=max(0.0, outside_s))


def mean_of(one: Overhead, other: Overhead) -> Overhead:
    """Half way between two measurements."""
    pairs = zip(astuple(one), astuple(other), strict=True)
    factor, per_request_s = ((a + b) / 2 for a, b in pairs)
    return Overhead(factor=factor, per_request_s=per_request_s)


def rounded(overhead: Overhead) -> dict[str, float]:
    """For the file."""
    return {name: round(value, 6) for name, value in asdict(overhead).items()}


def trace_of(count: int, rate_rps: float, seed: int) -> list[Request]:
    """The requests that both play."""
    spec = scenario.WorkloadSpec(
        trace="azure-conv",
        requests=count,
        rate_rps=rate_rps,
        cv=1.0,
        prompt_factor=PROMPT_FACTOR,
        answer_factor=ANSWER_FACTOR,
        seed=seed,
    )
    return scenario.workload_of(spec)


def planned(requests: list[Request]) -> list[PlannedRequest]:
    """The same, with random tokens for prompts."""
    rng = random.Random(7)
    return [
        PlannedRequest(
            index=index,
            at_s=request.arrival_s,
            prompt=tuple(rng.randrange(16, VOCABULARY) for _ in range(request.prompt_tokens)),
            max_tokens=request.answer_tokens,
        )
        for index, request in enumerate(requests)
    ]


def simulated(requests: list[Request], model: EngineModel, overhead: Overhead, policy: str) -> list[float]:
    """Completion times in the simulator, seconds."""
    config = FleetConfig(
        request_overhead_s=overhead.per_request_s,
        engine=EngineConfig(
            num_blocks=KV_MIB * 2**20 // (16 * model.kv_bytes_per_token),
            host_blocks=KV_MIB * 2**20 // (16 * model.kv_bytes_per_token),
            max_sequences=MAX_SEQUENCES,
            token_budget=TOKEN_BUDGET,
        ),
    )
    slowed = model.slowed(factor=overhead.factor, per_iteration_s=0.0)
    return [float(seconds) for seconds in scenario.simulate(requests, config, slowed, policy).jct_s]


def saturation_rps(model: EngineModel, overhead: Overhead) -> float:
    """What FCFS completes per second in the simulator while it never lacks requests."""
    backlog = trace_of(800, 1e6, seed=1)
    return len(backlog) / max(simulated(backlog, model, overhead, "fcfs"))


async def live_and_simulated(
    policy: str, model: EngineModel, *, count: int, load: float, seed: int
) -> dict[str, Any]:
    """One policy through a fleet of its own and through the simulator."""
    document = fleet_document(
        workers=1,
        policy=policy,
        max_sequences=MAX_SEQUENCES,
        max_batch_tokens=TOKEN_BUDGET,
        kv_mib=KV_MIB,
    )
    document["kvstore"] = {"enabled": False}
    with running(document) as fleet:
        async with grpc_driver(fleet.grpc, model=MODEL) as driver:
            warm = closed(count=8, lengths=Lengths(), vocabulary=VOCABULARY, seed=1)
            await run_closed_loop(warm, driver, concurrency=4)
            before = await probe(driver, model, policy, seed=1000)
            rate = load * saturation_rps(model, before)
            requests = trace_of(count, rate, seed)
            run = await run_open_loop(planned(requests), driver)
            after = await probe(driver, model, policy, seed=2000)
    overhead = mean_of(before, after)
    failed = [outcome.error for outcome in run.outcomes if outcome.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    live_s = sorted(outcome.e2e_s for outcome in run.outcomes)
    model_s = sorted(simulated(requests, model, overhead, policy))
    figures: dict[str, Any] = {
        "requests": count,
        "rate_rps": round(rate, 3),
        "load": load,
        "overhead_before": rounded(before),
        "overhead_after": rounded(after),
        "drift": round(abs(before.factor / after.factor - 1), 3),
    }
    for name, of in (("mean", statistics.fmean), ("p50", lambda s: percentile(s, 0.5)), ("p99", p99)):
        live, sim = of(live_s), of(model_s)
        figures[f"live_jct_s_{name}"] = round(live, 4)
        figures[f"simulated_jct_s_{name}"] = round(sim, 4)
        figures[f"simulated_over_live_{name}"] = round(sim / live, 3)
    return figures


def p99(ordered: list[float]) -> float:
    """The 99th percentile."""
    return percentile(ordered, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", type=Path, default=RESULTS / "iteration_profile.json")
    parser.add_argument("--policy", default="fcfs,mlfq")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--load", type=float, default=0.8, help="share of what the engine can do")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = from_file(arguments.profile)
    figures: dict[str, object] = {"variant": model.name}
    for policy in arguments.policy.split(","):
        kept: list[dict[str, Any]] = []
        for _ in range(2 * arguments.repeats):
            found = asyncio.run(
                live_and_simulated(
                    policy, model, count=arguments.requests, load=arguments.load, seed=arguments.seed
                )
            )
            print(policy, found, flush=True)
            if found["drift"] <= DRIFT:
                kept.append(found)
            if len(kept) == arguments.repeats:
                break
        ratios = {
            name: statistics.median(run[f"simulated_over_live_{name}"] for run in kept)
            for name in ("mean", "p50", "p99")
        }
        is_within = all(abs(ratios[name] - 1) <= BAR for name in ("mean", "p99"))
        figures[policy] = {"runs": kept, "median_simulated_over_live": ratios, "within_15_percent": is_within}
    print(write_result("simulator_calibration", figures))


if __name__ == "__main__":
    main()
