"""CachedAttention live: the second and later turns of conversations, with their KV kept and without.

    python -m benchmarks.cached_attention_live [--sessions 8] [--turns 5]

One worker whose KV memory holds one or two histories, so that between a session's turns its blocks
leave it. Every turn is asked twice, in an order drawn by the seed: by the session's own tenant, whose
history lies in the tier below (DRAM, or SSD where DRAM is made small), and by a tenant that nobody
has seen, which computes the same prompt anew. Both answers must be equal. The cold tenants also show
isolation: they find nothing, whoever asked before. CachedAttention, section 4; the bar is a median
TTFT of at most 0.35 of recomputing at a history of at least 8 times the new tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics

from benchmarks.fleet import MODEL, RunningFleet, fleet_document, running, write_result
from trireme.load.drivers import Driver, grpc_driver
from trireme.load.outcome import Outcome
from trireme.load.plan import PlannedRequest

VOCABULARY = 4000
TIERS = {
    "dram": {"dram_mib": 768, "ssd_mib": 0},
    "ssd": {"dram_mib": 32, "ssd_mib": 2048},
}


async def ask(driver: Driver, prompt: list[int], *, tenant: str, session: str, answer_tokens: int) -> Outcome:
    """One turn, alone on the fleet."""
    outcome = await driver(
        PlannedRequest(
            index=0,
            at_s=0.0,
            prompt=tuple(prompt),
            max_tokens=answer_tokens,
            tenant=tenant,
            session_id=session,
        )
    )
    if outcome.error is not None:
        raise RuntimeError(f"a turn of {session} failed: {outcome.error}")
    return outcome


async def converse(fleet: RunningFleet, arguments: argparse.Namespace) -> dict[str, object]:
    """All sessions, turn by turn."""
    rng = random.Random(arguments.seed)
    histories = [_tokens(rng, arguments.history) for _ in range(arguments.sessions)]
    warm: list[float] = []
    cold: list[float] = []
    cold_hits = 0
    cached_share: list[float] = []
    equal = True
    async with grpc_driver(fleet.grpc, model=MODEL) as driver:
        for warm_up in range(5):
            await ask(driver, _tokens(rng, 64), tenant=f"warm-up-{warm_up}", session="", answer_tokens=8)
        for turn in range(arguments.turns):
            for session, history in enumerate(histories):
                history.extend(_tokens(rng, arguments.new_tokens))
                tenants = [f"tenant-{session}", f"stranger-{turn}-{session}"]
                outcomes = {}
                for tenant in rng.sample(tenants, 2):
                    outcomes[tenant] = await ask(
                        driver,
                        history,
                        tenant=tenant,
                        session=f"session-{session}",
                        answer_tokens=arguments.answer_tokens,
                    )
                    await asyncio.sleep(arguments.think_s)
                own, stranger = (outcomes[tenant] for tenant in tenants)
                equal &= own.text == stranger.text
                cold_hits += stranger.cached_tokens
                if turn:
                    warm.append(own.ttft_s or 0.0)
                    cold.append(stranger.ttft_s or 0.0)
                    cached_share.append(own.cached_tokens / len(history))
                # The next turn's history holds as many tokens as the answer had, whatever its text was.
                history.extend(_tokens(rng, arguments.answer_tokens))
    return {
        "ttft_cached_ms_p50": round(1000 * statistics.median(warm), 2),
        "ttft_recomputed_ms_p50": round(1000 * statistics.median(cold), 2),
        "cached_over_recomputed": round(statistics.median(warm) / statistics.median(cold), 3),
        "prompt_tokens_found_mean": round(statistics.fmean(cached_share), 3),
        "found_by_strangers_tokens": cold_hits,
        "equal_answers": equal,
        "turns_measured": len(warm),
    }


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(16, VOCABULARY) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--history", type=int, default=1200, help="tokens before the first turn")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--kv-mib", type=int, default=16)
    parser.add_argument("--think-s", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="trireme-py-6m")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"settings": vars(arguments)}
    for tier, sizes in TIERS.items():
        document = fleet_document(workers=1, variant=arguments.variant, kv_mib=arguments.kv_mib)
        document["kvstore"] = sizes
        with running(document) as fleet:
            figures[tier] = asyncio.run(converse(fleet, arguments))
    print(write_result("cached_attention_live", figures).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
