"""FastServe's experiments in the simulator: what preemption is worth, and where it is not.

    python -m benchmarks.fastserve_sim [--experiment 1,2,3,4,6] [--requests 400] [--seeds 3]

All policies play the same requests on the same modelled engine (Llama-2-7B on an A100, batches of 16, 2,048
tokens per iteration, as in the artifact). Latency per token is the mean of a request's completion time over
its answer tokens; the objective is ten times a decode iteration of one sequence.

1  highest rate that meets the objective, by policy and mix of lengths
2  rates just above what FCFS can do, twice as many requests
3  prompts 0.25 to 256 times as long as answers
4  KV for a quarter of the demand: copied ahead, copied on demand, or computed again
6  the longest request with and without promotion of the starving

The artifact's runs have 400 requests; a rate above saturation is then an overload that ends. Experiment 1
repeats with longer runs and larger batches, since the answer depends on both.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.fleet import write_result
from trireme.policies.mlfq import MlfqSettings
from trireme.simulator import operators, scenario, traces, workloads
from trireme.simulator.engine_config import EngineConfig, Swapping
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.fleet import FleetConfig
from trireme.simulator.result import Result

PROFILE = "a100-llama2-7b"
MODEL = operators.published(PROFILE)
OBJECTIVE_S = 10 * MODEL.decode_s(1, 512)
ENGINE = EngineConfig(num_blocks=8192, host_blocks=65536, max_sequences=16, token_budget=2048)
BASELINES = ("fcfs", "naive", "fixed")
RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
BACKLOG = 4000
LONGEST_BLOCKS = 272
"""Any one request of the mixes fits."""
STEP = 1.03
"""Rates are found to within this factor."""
NO_PROMOTION = MlfqSettings(alpha_s=math.inf)


class Bench:
    """Plays one mix of lengths at one rate, averaged over seeds."""

    def __init__(self, requests: int, seeds: int) -> None:
        self.requests = requests
        self.seeds = range(1, seeds + 1)

    def runs(
        self,
        policy: str,
        lengths: workloads.Lengths,
        rate_rps: float,
        *,
        engine: EngineConfig = ENGINE,
        settings: MlfqSettings | None = None,
        model: EngineModel = MODEL,
    ) -> list[Result]:
        """One result per seed."""
        config = FleetConfig(engine=engine)
        return [
            scenario.simulate(
                workloads.generate(count=self.requests, rate_rps=rate_rps, lengths=lengths, seed=seed),
                config,
                model,
                policy,
                settings=settings,
            )
            for seed in self.seeds
        ]

    def saturation_rps(self, lengths: workloads.Lengths, *, engine: EngineConfig = ENGINE) -> float:
        """Requests per second that FCFS completes while it never lacks any: of a backlog that is long enough
        for its last few, which leave the batch half empty, not to count."""
        backlog = workloads.generate(count=BACKLOG, rate_rps=1e6, lengths=lengths, seed=1)
        ended_s = scenario.simulate(backlog, FleetConfig(engine=engine), MODEL, "fcfs").finish_s
        ended_s.sort()
        first, last = BACKLOG // 10, 9 * BACKLOG // 10
        return (last - first) / float(ended_s[last] - ended_s[first])

    def highest_rps(self, meets: Callable[[float], bool], low_rps: float) -> float:
        """The highest rate that meets, between `low_rps` and 16 times that, by halving the logarithm."""
        low, high = low_rps, 16 * low_rps
        if not meets(low):
            return 0.0
        while high / low > STEP:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if meets(middle) else (low, middle)
        return low


def mean_of(runs: list[Result], figure: str) -> float:
    """A figure's mean over seeds."""
    return statistics.fmean(run.figures()[figure] for run in runs)


def mixes() -> dict[str, workloads.Lengths]:
    """The mixes of lengths by name."""
    recorded = traces.read(traces.find("azure-conv"))
    return {**workloads.MIXES, "azure-conv": workloads.sampled_lengths(recorded)}


def highest_rates(
    bench: Bench, lengths: workloads.Lengths, policies: tuple[str, ...], engine: EngineConfig = ENGINE
) -> dict[str, float]:
    """By policy, the highest rate whose mean latency per token meets the objective; ratios to FCFS."""
    saturation = bench.saturation_rps(lengths, engine=engine)
    rates = {}
    for policy in policies:

        def meets(rate: float, policy: str = policy) -> bool:
            runs = bench.runs(policy, lengths, rate, engine=engine)
            return mean_of(runs, "per_token_s_mean") <= OBJECTIVE_S

        rates[policy] = bench.highest_rps(meets, 0.4 * saturation)
    figures = {"saturation_rps": round(saturation, 3)}
    figures |= {f"{policy}_rps": round(rate, 3) for policy, rate in rates.items()}
    figures |= {f"{policy}_over_fcfs": round(rate / rates["fcfs"], 2) for policy, rate in rates.items()}
    return figures


def experiment_1(bench: Bench) -> dict[str, object]:
    """Highest rates; bars 2.0 (ShareGPT-like) and 1.6 (Alpaca-like) against FCFS."""
    figures: dict[str, object] = {}
    for name, lengths in mixes().items():
        figures[name] = highest_rates(bench, lengths, ("fcfs", "naive", "fixed", "mlfq", "srpt"))
        print(1, name, figures[name], flush=True)
    sharegpt = workloads.SHAREGPT_LIKE
    for requests in (1000, 3000):
        longer = Bench(requests, 1)
        figures[f"sharegpt-like, {requests} requests"] = highest_rates(longer, sharegpt, ("fcfs", "mlfq"))
        print(1, requests, figures[f"sharegpt-like, {requests} requests"], flush=True)
    for batch in (64, 128):
        engine = replace(ENGINE, max_sequences=batch, num_blocks=16384)
        larger = Bench(batch * 25, 1)
        name = f"sharegpt-like, batch {batch}, {batch * 25} requests"
        figures[name] = highest_rates(larger, sharegpt, ("fcfs", "mlfq"), engine)
        print(1, name, figures[name], flush=True)
    return figures


def experiment_2(bench: Bench) -> dict[str, object]:
    """5 % and 20 % above saturation; bars: mean per token >= 3 times, P95 >= 2 times better than FCFS."""
    figures: dict[str, object] = {}
    longer = Bench(2 * bench.requests, len(bench.seeds))
    for name, lengths in mixes().items():
        saturation = bench.saturation_rps(lengths)
        for load in (1.05, 1.2):
            row: dict[str, float] = {"rate_rps": round(load * saturation, 3)}
            for policy in ("fcfs", "naive", "fixed", "mlfq", "srpt"):
                runs = longer.runs(policy, lengths, load * saturation)
                for figure in ("per_token_s_mean", "per_token_s_p95", "jct_s_mean", "jct_s_max"):
                    row[f"{policy}_{figure}"] = round(mean_of(runs, figure), 4)
            for policy in ("mlfq", "srpt"):
                for figure in ("per_token_s_mean", "per_token_s_p95", "jct_s_mean", "jct_s_max"):
                    ratio = row[f"fcfs_{figure}"] / row[f"{policy}_{figure}"]
                    row[f"fcfs_over_{policy}_{figure}"] = round(ratio, 2)
            figures[f"{name} at {load:g}"] = row
            print(2, name, load, row, flush=True)
    return figures


def experiment_3(bench: Bench) -> dict[str, object]:
    """Ratios of prompt to answer; bar: at most 1.1 times the best of FCFS, naive and fixed, on each."""
    figures: dict[str, object] = {}
    for ratio in RATIOS:
        lengths = workloads.ratio_of_means(ratio, mean_tokens=512, sigma=1.0)
        rate = bench.saturation_rps(lengths)
        latency = {
            policy: mean_of(bench.runs(policy, lengths, rate), "per_token_s_mean")
            for policy in (*BASELINES, "mlfq", "srpt")
        }
        best = min(latency[policy] for policy in BASELINES)
        row = {"rate_rps": round(rate, 3)}
        row |= {f"{policy}_per_token_s": round(seconds, 4) for policy, seconds in latency.items()}
        row["mlfq_over_best_baseline"] = round(latency["mlfq"] / best, 3)
        row["fcfs_over_mlfq"] = round(latency["fcfs"] / latency["mlfq"], 2)
        figures[f"{ratio:g}"] = row
        print(3, ratio, row, flush=True)
    return figures


def experiment_4(bench: Bench) -> dict[str, object]:
    """KV for a quarter of the demand; bars: rate >= 1.6 times reactive, >= 2.4 times recompute.

    The demand is what MLFQ holds at 1.2 times saturation where nothing lacks. An eighth of it, and a link
    of a third of the speed, show what the answer depends on.
    """
    lengths = workloads.SHAREGPT_LIKE
    saturation = bench.saturation_rps(lengths)
    unlimited = replace(ENGINE, num_blocks=65536)
    demand = max(
        moment.device_blocks
        for run in bench.runs("mlfq", lengths, 1.2 * saturation, engine=unlimited)
        for moment in run.timeline
    )
    figures: dict[str, object] = {"demand_blocks": demand}
    for share, link_gb_s in ((4, 25.0), (8, 25.0), (4, 8.0), (8, 8.0)):
        model = replace(MODEL, link_bytes_per_s=1e9 * link_gb_s)
        device_blocks = max(demand // share, LONGEST_BLOCKS)
        row: dict[str, float] = {"device_blocks": device_blocks}
        for swapping in Swapping:
            engine = replace(
                ENGINE,
                num_blocks=device_blocks,
                host_blocks=0 if swapping is Swapping.RECOMPUTE else ENGINE.host_blocks,
                swapping=swapping,
            )

            def meets(rate: float, engine: EngineConfig = engine, model: EngineModel = model) -> bool:
                runs = bench.runs("mlfq", lengths, rate, engine=engine, model=model)
                return mean_of(runs, "per_token_s_mean") <= OBJECTIVE_S

            row[f"{swapping.value}_rps"] = round(bench.highest_rps(meets, 0.2 * saturation), 3)
        for other in (Swapping.REACTIVE, Swapping.RECOMPUTE):
            row[f"proactive_over_{other.value}"] = round(
                row["proactive_rps"] / max(row[f"{other.value}_rps"], 1e-9), 2
            )
        figures[f"1/{share} of the demand, {link_gb_s:g} GB/s"] = row
        print(4, share, link_gb_s, row, flush=True)
    return figures


def experiment_6(bench: Bench) -> dict[str, object]:
    """1.2 times saturation; bars: promotion cuts the maximum to <= 0.8 at <= 1.3 times the mean."""
    figures: dict[str, object] = {}
    for name, lengths in mixes().items():
        rate = 1.2 * bench.saturation_rps(lengths)
        row: dict[str, float] = {"rate_rps": round(rate, 3)}
        for label, policy, settings in (
            ("fcfs", "fcfs", None),
            ("promotion", "mlfq", None),
            ("no_promotion", "mlfq", NO_PROMOTION),
        ):
            runs = bench.runs(policy, lengths, rate, settings=settings)
            for figure in ("per_token_s_mean", "jct_s_mean", "jct_s_p99", "jct_s_max"):
                row[f"{label}_{figure}"] = round(mean_of(runs, figure), 4)
        for figure in ("jct_s_max", "jct_s_p99", "jct_s_mean", "per_token_s_mean"):
            row[f"with_over_without_{figure}"] = round(
                row[f"promotion_{figure}"] / row[f"no_promotion_{figure}"], 3
            )
        row["max_over_fcfs"] = round(row["promotion_jct_s_max"] / row["fcfs_jct_s_max"], 2)
        figures[name] = row
        print(6, name, row, flush=True)
    return figures


EXPERIMENTS = {"1": experiment_1, "2": experiment_2, "3": experiment_3, "4": experiment_4, "6": experiment_6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experiment", default="1,2,3,4,6")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments.requests, arguments.seeds)
    figures: dict[str, object] = {
        "profile": PROFILE,
        "objective_s_per_token": round(OBJECTIVE_S, 4),
        "max_sequences": ENGINE.max_sequences,
        "token_budget": ENGINE.token_budget,
        "requests": arguments.requests,
        "seeds": arguments.seeds,
    }
    started_s = time.perf_counter()
    for name in arguments.experiment.split(","):
        figures[f"experiment_{name}"] = EXPERIMENTS[name](bench)
    figures["wall_s"] = round(time.perf_counter() - started_s)
    print(write_result("fastserve_sim", figures))


if __name__ == "__main__":
    main()
