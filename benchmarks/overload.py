"""Ten times more than the fleet can do: what is done of it, what is refused, and who suffers.

    python -m benchmarks.overload [--seconds 60] [--times 10]

One fleet, one worker, four loads, one after the other:

- capacity: as many requests at once as keep the worker full, in a closed loop;
- unloaded: a tenant that asks for `--fair-load` of its fair share of that, evenly, and nobody else;
- busy: the same tenant, and another one that asks for as much: no overload, but batches are shared;
- overload: the same tenant at the same pace, and one that floods the fleet with the rest of `--times` the
  capacity, drawn as a Poisson process. Refused requests are not sent again. The flood begins `--warm-s`
  before the window that is measured.

Printed are the goodput (answers that ended within the window, per second) over the capacity, what was
refused and with which hints, and the well-behaved tenant's p99 over its p99 unloaded and in the busy fleet.
It asks the same in all of them. A full batch takes longer for each of its sequences than a small one, which
is no matter of fairness: the second ratio leaves it out. Where the clients share the machine with the fleet,
the refused requests' own cost comes off the capacity: answers of some length keep it small.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.fleet import MODEL, fleet_document, running, write_result
from trireme.load.drivers import Driver, grpc_driver
from trireme.load.outcome import Outcome
from trireme.load.plan import Lengths, PlannedRequest, closed
from trireme.load.report import percentile
from trireme.load.run import run_open_loop

VOCABULARY = 4000
FAIR, FLOOD = "fair", "flood"
TENANTS = 2


async def capacity(driver: Driver, arguments: argparse.Namespace) -> float:
    """Requests per second that end while the worker is kept full."""
    plan = closed(
        count=10_000,
        lengths=Lengths(
            prompt_tokens=arguments.prompt_tokens,
            answer_tokens=arguments.answer_tokens,
            spread=arguments.spread,
        ),
        vocabulary=VOCABULARY,
        seed=arguments.seed,
    )
    ended_s: list[float] = []  # of the requests that were answered

    async def work(own: Sequence[PlannedRequest]) -> None:
        for planned in own:
            outcome = await driver(planned)
            if outcome.error is None:
                ended_s.append(outcome.ended_s)

    streams = 2 * arguments.max_sequences
    workers = [asyncio.create_task(work(plan[number::streams])) for number in range(streams)]
    started_s = time.monotonic()
    await asyncio.sleep(arguments.warm_s + arguments.seconds / 2)
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)
    begin_s = started_s + arguments.warm_s
    lasted_s = time.monotonic() - begin_s
    return float(sum(moment >= begin_s for moment in ended_s) / lasted_s)


def evenly(arguments: argparse.Namespace, rate_rps: float, *, tenant: str, seed: int) -> list[PlannedRequest]:
    """A well-behaved tenant's requests, at a steady pace that wavers a little."""
    rng = random.Random(seed)
    count = int(arguments.seconds * rate_rps)
    return [
        _planned(arguments, rng, tenant, (number + rng.uniform(0.0, 0.2)) / rate_rps)
        for number in range(count)
    ]


def flooding(arguments: argparse.Namespace, rate_rps: float, rng: random.Random) -> list[PlannedRequest]:
    """The flood, in every request as expensive as the others."""
    planned, at_s = [], -arguments.warm_s
    while (at_s := at_s + rng.expovariate(rate_rps)) < arguments.seconds:
        planned.append(_planned(arguments, rng, FLOOD, at_s))
    return planned


def _planned(arguments: argparse.Namespace, rng: random.Random, tenant: str, at_s: float) -> PlannedRequest:
    prompt = tuple(rng.randrange(16, VOCABULARY) for _ in range(arguments.prompt_tokens))
    spread = rng.uniform(1 - arguments.spread, 1 + arguments.spread)
    answer_tokens = max(1, round(arguments.answer_tokens * spread))
    return PlannedRequest(index=0, at_s=at_s, prompt=prompt, max_tokens=answer_tokens, tenant=tenant)


async def offered(
    driver: Driver, planned: Sequence[PlannedRequest]
) -> tuple[dict[str, list[Outcome]], float]:
    """The outcomes by tenant, and when the window began."""
    earliest_s = min(0.0, *(one.at_s for one in planned))
    numbered = [replace(one, index=number, at_s=one.at_s - earliest_s) for number, one in enumerate(planned)]
    started_s = time.monotonic() - earliest_s
    run = await run_open_loop(numbered, driver)
    found: dict[str, list[Outcome]] = {FAIR: [], FLOOD: []}
    for one, outcome in zip(numbered, run.outcomes, strict=True):
        found[one.tenant].append(outcome)
    return found, started_s


def latencies(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Seconds of the requests that were answered."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    e2e = sorted(outcome.e2e_s for outcome in good)
    ttft = sorted(outcome.ttft_s for outcome in good if outcome.ttft_s is not None)
    return {
        "asked": len(outcomes),
        "answered": len(good),
        "e2e_s_p50": round(percentile(e2e, 0.5), 4),
        "e2e_s_p99": round(percentile(e2e, 0.99), 4),
        "ttft_s_p50": round(percentile(ttft, 0.5), 4),
        "ttft_s_p99": round(percentile(ttft, 0.99), 4),
    }


async def measure(addresses: Sequence[str], arguments: argparse.Namespace) -> dict[str, object]:
    """All three loads on a running fleet."""
    async with grpc_driver(addresses, model=MODEL) as driver:
        able_rps = await capacity(driver, arguments)
        fair_rps = arguments.fair_load * able_rps / TENANTS
        fair = evenly(arguments, fair_rps, tenant=FAIR, seed=arguments.seed)
        await asyncio.sleep(2.0)
        alone, _ = await offered(driver, fair)
        await asyncio.sleep(2.0)
        other = evenly(arguments, fair_rps, tenant=FLOOD, seed=arguments.seed + 1)
        busy, _ = await offered(driver, fair + other)
        await asyncio.sleep(2.0)
        rng = random.Random(arguments.seed + 2)
        flood = flooding(arguments, arguments.times * able_rps - fair_rps, rng)
        both, started_s = await offered(driver, fair + flood)
        after_rps = await capacity(driver, arguments)
    outcomes = both[FAIR] + both[FLOOD]
    until_s = started_s + arguments.seconds
    good = sum(o.error is None and started_s <= o.ended_s <= until_s for o in outcomes)
    good_rps = good / arguments.seconds
    refused = [outcome for outcome in outcomes if outcome.error is not None]
    hints = sorted(o.retry_after_s for o in refused if o.retry_after_s is not None)
    unloaded, shared, loaded = (latencies(found[FAIR]) for found in (alone, busy, both))
    mean_rps = (able_rps + after_rps) / 2
    return {
        "capacity_rps": [round(able_rps, 3), round(after_rps, 3)],
        "offered_over_capacity": round(len(outcomes) / (arguments.seconds + arguments.warm_s) / mean_rps, 2),
        "goodput_rps": round(good_rps, 3),
        "goodput_over_capacity": round(good_rps / mean_rps, 3),
        "refused": {
            "requests": len(refused),
            "by_code": dict(Counter(outcome.error for outcome in refused)),
            "of_the_fair_tenant": sum(outcome.error is not None for outcome in both[FAIR]),
            "with_a_hint": len(hints),
            "hint_s_p50": round(percentile(hints, 0.5), 2),
            "hint_s_max": round(hints[-1], 2) if hints else 0.0,
            "answer_ms_p50": round(1000 * percentile(sorted(o.e2e_s for o in refused), 0.5), 2),
        },
        "fair_tenant": {"unloaded": unloaded, "busy": shared, "overloaded": loaded},
        "flood": latencies(both[FLOOD]),
        "p99_over_unloaded": _ratios(loaded, unloaded),
        "p99_over_busy": _ratios(loaded, shared),
    }


def _ratios(over: dict[str, float], under: dict[str, float]) -> dict[str, float]:
    return {name: round(over[name] / max(under[name], 1e-9), 3) for name in ("e2e_s_p99", "ttft_s_p99")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=10.0, help="offered load over the capacity")
    parser.add_argument(
        "--fair-load", type=float, default=0.8, help="of its fair share, what the tenant asks"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=192)
    parser.add_argument("--spread", type=float, default=0.5, help="answers are as long within +- this share")
    parser.add_argument("--max-sequences", type=int, default=4)
    parser.add_argument("--goal-s", type=float, default=10.0, help="slo.standard.ttft_s")
    parser.add_argument("--warm-s", type=float, default=5.0)
    parser.add_argument("--variant", default="trireme-py-16m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    document = {
        **fleet_document(workers=1, variant=arguments.variant, max_sequences=arguments.max_sequences),
        "slo": {"standard": {"ttft_s": arguments.goal_s}},
    }
    with running(document) as fleet:
        figures = asyncio.run(measure(fleet.grpc, arguments))
    print(write_result("overload", {"settings": vars(arguments), **figures}).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
