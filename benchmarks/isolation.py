"""Whether a prompt's latency tells a tenant that somebody else has asked it before.

    python -m benchmarks.isolation [--prompts 60]

One fleet, one worker. Each prompt is asked by tenants that nobody has seen, one at a time, in an order
drawn by the seed: half of the prompts were asked just before by another tenant (`seen`), half by nobody
(`new`). The tenants' caches must not help: no token is found, and the two samples of time to first
token come from one distribution as far as the two-sample Kolmogorov-Smirnov statistic tells; its
p-value is that of permutations of the same figures. So that the test is known to see what it looks
for, the same tenant asks again (`own`), and must be told apart from `new`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from bisect import bisect_right
from collections.abc import Sequence

from benchmarks.cached_attention_live import ask
from benchmarks.fleet import MODEL, RunningFleet, fleet_document, running, write_result
from trireme.load.drivers import grpc_driver

VOCABULARY = 4000
PERMUTATIONS = 10_000


def ks_statistic(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest distance between the empirical distribution functions of two samples."""
    first, second = sorted(one), sorted(other)
    return max(
        abs(bisect_right(first, value) / len(first) - bisect_right(second, value) / len(second))
        for value in (*first, *second)
    )


def ks_p_value(one: Sequence[float], other: Sequence[float], rng: random.Random) -> float:
    """Share of random splits of both samples together that lie as far apart, the real one included."""
    found = ks_statistic(one, other)
    pooled = [*one, *other]
    as_far = 1
    for _ in range(PERMUTATIONS):
        rng.shuffle(pooled)
        as_far += ks_statistic(pooled[: len(one)], pooled[len(one) :]) >= found
    return as_far / (PERMUTATIONS + 1)


async def probe(fleet: RunningFleet, arguments: argparse.Namespace) -> dict[str, object]:
    """Ask all prompts; what each kind of asking took and found."""
    rng = random.Random(arguments.seed)
    ttft_s: dict[str, list[float]] = {"new": [], "seen": [], "own": []}
    found: dict[str, int] = dict.fromkeys(ttft_s, 0)
    asked = 0

    async def once(tenant: str, prompt: list[int], kind: str | None) -> None:
        outcome = await ask(driver, prompt, tenant=tenant, session="", answer_tokens=4)
        if kind is not None:
            ttft_s[kind].append(outcome.ttft_s or 0.0)
            found[kind] += outcome.cached_tokens
        await asyncio.sleep(arguments.think_s)

    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        for number in range(5):
            await once(f"warm-up-{number}", _tokens(rng, arguments.prompt_tokens), None)
        kinds = ["new", "seen"] * (arguments.prompts // 2)
        rng.shuffle(kinds)
        for kind in kinds:
            asked += 1
            prompt = _tokens(rng, arguments.prompt_tokens)
            # Before each measured request there is another of the same size, of this prompt or not.
            earlier = prompt if kind == "seen" else _tokens(rng, arguments.prompt_tokens)
            await once(f"victim-{asked}", earlier, None)
            await once(f"stranger-{asked}", prompt, kind)
            await once(f"stranger-{asked}", prompt, "own")
    new = ttft_s["new"]
    return {
        "found_tokens": found,
        "ttft_ms_p50": {kind: round(1000 * statistics.median(taken), 3) for kind, taken in ttft_s.items()},
        "samples": {kind: len(taken) for kind, taken in ttft_s.items()},
        "seen_against_new": _compared(ttft_s["seen"], new, rng),
        "own_against_new": _compared(ttft_s["own"], new, rng),
        "ttft_ms": {kind: [round(1000 * one, 3) for one in taken] for kind, taken in ttft_s.items()},
    }


def _compared(one: Sequence[float], other: Sequence[float], rng: random.Random) -> dict[str, float]:
    return {
        "ks_statistic": round(ks_statistic(one, other), 4),
        "p_value": round(ks_p_value(one, other, rng), 5),
    }


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(16, VOCABULARY) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="half of them are seen, half are new")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--think-s", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="trireme-py-6m")
    arguments = parser.parse_args()
    document = fleet_document(workers=1, variant=arguments.variant)
    with running(document) as fleet:
        figures = asyncio.run(probe(fleet, arguments))
    print(write_result("isolation", {"settings": vars(arguments), **figures}).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
