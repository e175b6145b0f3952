"""FastServe live: first come, first served against skip-join MLFQ, through the whole fleet.

    python -m benchmarks.fastserve_live [--requests 200] [--load 1.2] [--repeats 2] [--mix azure-conv]

One worker, a small batch, answers of forced length: pairs of prompt and answer length of the Azure
conversation trace, or of a mix with a heavy tail, scaled down, with Poisson arrivals, drawn by the
seed. The load is a multiple of what the same fleet finishes per second when it never idles, measured
first. Both policies get the same plan; JCT is from sending to the last token. FastServe, section 6 of
the paper; the bar is a mean JCT ratio of at least 2 at 1.2x load with no request later than 1.3x the latest.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fastserve_sim import mixes
from benchmarks.fleet import CHECKPOINTS, MODEL, RunningFleet, fleet_document, running, write_result
from benchmarks.worker_metrics import worker_counters
from trireme.load.drivers import grpc_driver
from trireme.load.plan import PlannedRequest
from trireme.load.report import percentile
from trireme.load.run import Run, run_closed_loop, run_open_loop
from trireme.simulator.workloads import generate

VARIANT = "trireme-py-6m"
VOCABULARY = 4000
CONTEXT = 2048


def plan_of(
    mix: str, count: int, *, rate_rps: float, prompt_scale: float, answer_scale: float, seed: int
) -> list[PlannedRequest]:
    """Requests of the mix's lengths with Poisson arrivals; every prompt is new."""
    rng = random.Random(seed)
    planned: list[PlannedRequest] = []
    requests = generate(count=count, rate_rps=rate_rps, lengths=mixes()[mix], seed=seed)
    for index, request in enumerate(requests):
        answer = max(1, round(request.answer_tokens * answer_scale))
        length = min(max(1, round(request.prompt_tokens * prompt_scale)), CONTEXT - answer - 1)
        prompt = tuple(rng.randrange(16, VOCABULARY) for _ in range(length))
        planned.append(PlannedRequest(index=index, at_s=request.arrival_s, prompt=prompt, max_tokens=answer))
    return planned


async def capacity_rps(fleet: RunningFleet, plan: Sequence[PlannedRequest], *, concurrency: int) -> float:
    """Requests per second while the worker never idles."""
    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        run = await run_closed_loop(plan, driver, concurrency=concurrency)
    return len(run.outcomes) / run.duration_s


async def play(fleet: RunningFleet, plan: Sequence[PlannedRequest]) -> Run:
    """The plan at its own times."""
    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        return await run_open_loop(plan, driver)


def tie_at_first_difference(planned: PlannedRequest, answers: Sequence[str]) -> dict[str, object]:
    """How near the two likeliest tokens are where answers part, by another implementation.

    Batches of other shapes add in another order, so logits differ by some 1e-5: a tie within that may
    fall either way. A greater margin is a wrong answer.
    """
    assert not isinstance(planned.prompt, str)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / VARIANT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / VARIANT)
    tokens = list(planned.prompt)
    margin = 0.0
    for place in range(planned.max_tokens):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        margin = float(best.values[0] - best.values[1])
        text = tokenizer.decode([*tokens[len(planned.prompt) :], int(best.indices[0])])
        if not all(answer.startswith(text) for answer in answers):
            return {"request": planned.index, "token": place, "margin": margin}
        tokens.append(int(best.indices[0]))
    return {"request": planned.index, "token": planned.max_tokens, "margin": margin}


def summary(run: Run, counters: dict[str, float]) -> dict[str, object]:
    """One policy's figures, seconds."""
    jct = sorted(outcome.e2e_s for outcome in run.outcomes)
    ttft = sorted(outcome.ttft_s or 0.0 for outcome in run.outcomes)
    per_token = [outcome.e2e_s / max(1, outcome.answer_tokens) for outcome in run.outcomes]
    return {
        "failed": sum(outcome.error is not None for outcome in run.outcomes),
        "jct_mean_s": round(statistics.fmean(jct), 3),
        "jct_p50_s": round(percentile(jct, 0.5), 3),
        "jct_p99_s": round(percentile(jct, 0.99), 3),
        "jct_max_s": round(jct[-1], 3),
        "ttft_mean_s": round(statistics.fmean(ttft), 3),
        "latency_per_token_ms": round(1000 * statistics.fmean(per_token), 1),
        "makespan_s": round(run.duration_s, 2),
        "recomputed_tokens": counters.get("trireme_engine_recomputed_tokens", 0.0),
        "preemptions": counters.get("trireme_engine_preemptions", 0.0),
        "swapped_out_blocks": counters.get("trireme_engine_swapped_out_blocks", 0.0),
    }


def document_of(policy: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The fleet file of one policy."""
    name, _, levels = policy.partition("/")
    return fleet_document(
        workers=1,
        variant=VARIANT,
        policy=name,
        mlfq_levels=levels or "doubling",
        max_sequences=arguments.max_sequences,
        max_batch_tokens=arguments.max_batch_tokens,
        kv_mib=arguments.kv_mib,
        swap_mib=arguments.swap_mib,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", type=float, default=1.2, help="multiple of the measured capacity")
    parser.add_argument("--repeats", type=int, default=2, help="plans, each with a seed of its own")
    parser.add_argument(
        "--policies", default="fcfs,mlfq", help="the first is the baseline; mlfq/demand takes learned levels"
    )
    parser.add_argument("--mix", choices=sorted(mixes()), default="azure-conv")
    parser.add_argument("--prompt-scale", type=float, default=0.1)
    parser.add_argument("--answer-scale", type=float, default=0.5)
    parser.add_argument("--max-sequences", type=int, default=4)
    parser.add_argument("--max-batch-tokens", type=int, default=128)
    parser.add_argument("--kv-mib", type=int, default=32)
    parser.add_argument("--swap-mib", type=int, default=256)
    arguments = parser.parse_args()
    policies = arguments.policies.split(",")
    scales = {"prompt_scale": arguments.prompt_scale, "answer_scale": arguments.answer_scale}

    with running(document_of(policies[0], arguments)) as fleet:
        warm = plan_of(arguments.mix, 60, rate_rps=1.0, seed=1000, **scales)
        asyncio.run(capacity_rps(fleet, warm[:20], concurrency=2 * arguments.max_sequences))
        capacity = asyncio.run(capacity_rps(fleet, warm[20:], concurrency=4 * arguments.max_sequences))
    rate_rps = arguments.load * capacity

    runs: list[dict[str, object]] = []
    for seed in range(arguments.repeats):
        plan = plan_of(arguments.mix, arguments.requests, rate_rps=rate_rps, seed=seed, **scales)
        texts: dict[str, list[str]] = {}
        row: dict[str, object] = {"seed": seed}
        for policy in policies:
            with running(document_of(policy, arguments)) as fleet:
                run = asyncio.run(play(fleet, plan))
                row[policy] = summary(run, worker_counters(fleet))
            texts[policy] = [outcome.text for outcome in run.outcomes]
        row["unequal_answers"] = [
            tie_at_first_difference(plan[index], answers)
            for index, answers in enumerate(zip(*texts.values(), strict=True))
            if len(set(answers)) > 1
        ]
        for policy in policies[1:]:
            base, other = row[policies[0]], row[policy]
            assert isinstance(base, dict) and isinstance(other, dict)
            row[f"{policies[0]}_over_{policy}"] = {
                key: round(base[key] / other[key], 3)
                for key in ("jct_mean_s", "jct_p50_s", "jct_p99_s", "ttft_mean_s", "latency_per_token_ms")
            }
            row[f"{policy}_over_{policies[0]}_max"] = round(other["jct_max_s"] / base["jct_max_s"], 3)
        runs.append(row)
    figures = {
        "settings": vars(arguments),
        "capacity_rps": round(capacity, 2),
        "rate_rps": round(rate_rps, 2),
        "runs": runs,
    }
    print(write_result("fastserve_live", figures, case=arguments.mix).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
