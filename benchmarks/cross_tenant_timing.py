"""Whether the holder of one API key can tell from latency what the holder of another has asked.

    python -m benchmarks.cross_tenant_timing [--prompts 80]

One fleet with a keys file of two tenants, so that who is who follows from keys alone. Half of the
prompts were asked just before by the victim (`cached`), half by nobody (`new`), in an order drawn by
the seed; the attacker asks each once and looks at its time to first token. What it can tell is the
area under the curve of the best threshold it could choose: the probability that a prompt that the
victim had asked is answered sooner than one that nobody had. Chance is 0.5; how far chance strays is
seen by permuting the same figures. The control: the attacker asks again itself (`own`), and must be
able to tell that from `new`, or the measurement could see nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cached_attention_live import ask
from benchmarks.fleet import MODEL, RunningFleet, fleet_document, running, write_result
from trireme.load.drivers import Driver, grpc_driver
from trireme.runtime.tenant_keys import key_digest, new_key

VOCABULARY = 4000
PERMUTATIONS = 10_000


def sooner(one: Sequence[float], other: Sequence[float]) -> float:
    """Probability that a figure of `one` is below one of `other`; ties count half."""
    ordered = sorted(other)
    wins = 0.0
    for value in one:
        low, high = bisect_left(ordered, value), bisect_right(ordered, value)
        wins += len(ordered) - high + (high - low) / 2
    return wins / (len(one) * len(ordered))


def p_value(one: Sequence[float], other: Sequence[float], rng: random.Random) -> float:
    """Share of random splits that stray as far from 0.5, in either direction, the real one included."""
    found = abs(sooner(one, other) - 0.5)
    pooled = [*one, *other]
    as_far = 1
    for _ in range(PERMUTATIONS):
        rng.shuffle(pooled)
        as_far += abs(sooner(pooled[: len(one)], pooled[len(one) :]) - 0.5) >= found
    return as_far / (PERMUTATIONS + 1)


async def attack(
    victim: Driver, attacker: Driver, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds to first token and cached tokens that the attacker saw, by kind of prompt."""
    rng = random.Random(arguments.seed)
    seconds: dict[str, list[float]] = {"new": [], "cached": [], "own": []}
    found: dict[str, int] = dict.fromkeys(seconds, 0)

    async def look(kind: str, prompt: list[int]) -> None:
        outcome = await ask(attacker, prompt, tenant="", session="", answer_tokens=2)
        seconds[kind].append(outcome.ttft_s or 0.0)
        found[kind] += outcome.cached_tokens
        await asyncio.sleep(arguments.think_s)

    for driver in (victim, attacker) * 3:
        await ask(driver, tokens(rng, arguments.prompt_tokens), tenant="", session="", answer_tokens=2)
    kinds = ["new", "cached"] * (arguments.prompts // 2)
    rng.shuffle(kinds)
    for kind in kinds:
        prompt = tokens(rng, arguments.prompt_tokens)
        # The victim is as busy before each, with this prompt or with another one.
        earlier = prompt if kind == "cached" else tokens(rng, arguments.prompt_tokens)
        await ask(victim, earlier, tenant="", session="", answer_tokens=2)
        await asyncio.sleep(arguments.think_s)
        await look(kind, prompt)
        await look("own", prompt)
    return seconds, found


async def measure(
    fleet: RunningFleet, keys: dict[str, str], arguments: argparse.Namespace
) -> dict[str, object]:
    async with (
        grpc_driver(fleet.grpc, model=MODEL, api_key=keys["victim"]) as victim,
        grpc_driver(fleet.grpc, model=MODEL, api_key=keys["attacker"]) as attacker,
    ):
        seconds, found = await attack(victim, attacker, arguments)
    rng = random.Random(arguments.seed)
    return {
        "found_tokens": found,
        "samples": {kind: len(taken) for kind, taken in seconds.items()},
        "ttft_ms_p50": {kind: round(1000 * statistics.median(taken), 3) for kind, taken in seconds.items()},
        "cached_against_new": compared(seconds["cached"], seconds["new"], rng),
        "own_against_new": compared(seconds["own"], seconds["new"], rng),
        "ttft_ms": {kind: [round(1000 * one, 3) for one in taken] for kind, taken in seconds.items()},
    }


def compared(one: Sequence[float], other: Sequence[float], rng: random.Random) -> dict[str, float]:
    return {"auc": round(sooner(one, other), 4), "p_value": round(p_value(one, other, rng), 5)}


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(16, VOCABULARY) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="half of them are cached, half are new")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--think-s", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="trireme-py-6m")
    arguments = parser.parse_args()
    keys = {"victim": new_key(), "attacker": new_key()}
    document = fleet_document(workers=1, variant=arguments.variant)
    with tempfile.TemporaryDirectory(prefix="trireme-keys-") as folder:
        file = Path(folder) / "keys.json"  # JSON is YAML, too.
        entries = {name: {"keys": [{"id": name, "sha256": key_digest(key)}]} for name, key in keys.items()}
        file.write_text(json.dumps({"tenants": entries}), encoding="utf-8")
        gateway = document["gateway"]
        assert isinstance(gateway, dict)
        gateway["keys"] = str(file)
        with running(document) as fleet:
            figures = asyncio.run(measure(fleet, keys, arguments))
    path = write_result("cross_tenant_timing", {"settings": vars(arguments), **figures})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
