"""What the fleet adds to the engine: per request, per token, and its ceiling without an engine.

    python -m benchmarks.overhead [--requests 100] [--answer-tokens 64]

In process and through the fleet the same prompts run one at a time, in turns, with the same
weights and one thread: with the default checkpoint, and with an engine that computes nothing. The
budget (docs/architecture.md): at most 1 ms at the median and 5 ms at p99 added to TTFT, 20 us per
token. The floor of gRPC and Redis is measured in the same run, since machines differ by far.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import torch

from benchmarks import floor
from benchmarks.fleet import CHECKPOINTS, MODEL, fleet_document, running, write_result
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, build
from trireme.load.drivers import grpc_driver
from trireme.load.plan import Lengths, PlannedRequest, closed
from trireme.load.report import percentile, summarise
from trireme.load.run import run_closed_loop
from trireme.models.null import NullModel

VOCABULARY = 4000


def floor_of_the_way(figures: dict[str, dict[str, float]]) -> float:
    """Milliseconds that a request and its first token need with nothing of ours: the client's call there
    and back, one stream entry to a scheduler and one to a worker, and half a call from worker to gateway.
    """
    return 1.5 * figures["grpc_unary"]["p50_ms"] + 2 * figures["stream_hop"]["p50_ms"]


def in_process(engine: Engine, planned: PlannedRequest) -> tuple[float, float]:
    """(TTFT seconds, seconds per token after it) of one request on the engine itself."""
    engine.add(
        SequenceRequest(
            sequence_id=f"r{planned.index}-{time.monotonic_ns()}",
            prompt_token_ids=planned.prompt,  # type: ignore[arg-type]
            sampling=SamplingParams(max_tokens=planned.max_tokens, temperature=0.0, ignore_eos=True),
            salt=str(time.monotonic_ns()).encode(),
        )
    )
    started_s = time.monotonic()
    times: list[float] = []
    while engine.has_work:
        times.extend(time.monotonic() for output in engine.step().outputs if output.token_id is not None)
    return times[0] - started_s, (times[-1] - times[0]) / max(1, len(times) - 1)


async def alternate(
    engine: Engine, document: dict[str, object], *, requests: int, answer_tokens: int
) -> dict[str, float]:
    """The same requests in process and through the fleet, in turns of ten."""
    lengths = Lengths(prompt_tokens=64, answer_tokens=answer_tokens)
    local: list[tuple[float, float]] = []
    remote: list[tuple[float, float]] = []
    with running(document) as fleet:
        async with grpc_driver(fleet.grpc, model=MODEL) as driver:
            for turn in range(-1, requests // 10):
                plan = closed(count=10, lengths=lengths, vocabulary=VOCABULARY, seed=turn + 1)
                near = [in_process(engine, planned) for planned in plan]
                run = await run_closed_loop(plan, driver, concurrency=1)
                far = [(o.ttft_s or 0.0, o.tpot_s or 0.0) for o in run.outcomes]
                if turn >= 0:  # the first turn warms both up
                    local.extend(near)
                    remote.extend(far)
    near_ttft = sorted(ttft for ttft, _ in local)
    far_ttft = sorted(ttft for ttft, _ in remote)
    return {
        "requests": len(local),
        "engine_ttft_ms_p50": 1000 * percentile(near_ttft, 0.5),
        "fleet_ttft_ms_p50": 1000 * percentile(far_ttft, 0.5),
        "added_ttft_ms_p50": 1000 * (percentile(far_ttft, 0.5) - percentile(near_ttft, 0.5)),
        "added_ttft_ms_p99": 1000 * (percentile(far_ttft, 0.99) - percentile(near_ttft, 0.99)),
        "engine_tpot_ms": 1000 * statistics.median(tpot for _, tpot in local),
        "fleet_tpot_ms": 1000 * statistics.median(tpot for _, tpot in remote),
        "added_us_per_token": 1e6
        * (statistics.median(t for _, t in remote) - statistics.median(t for _, t in local)),
    }


def _null_document() -> dict[str, object]:
    return fleet_document(workers=1, device="null", max_sequences=256, max_batch_tokens=65536)


async def ceilings(requests: int) -> dict[str, object]:
    """The ceilings of a fleet around an engine that computes nothing."""
    figures: dict[str, object] = {}
    with running(_null_document()) as fleet:
        async with grpc_driver(fleet.grpc, model=MODEL) as driver:
            for name, concurrency, answer_tokens, count in (
                ("warm_up", 8, 8, 200),
                ("requests_64_at_once", 64, 1, 20 * requests),
                ("tokens_64_at_once", 64, 256, 4 * requests),
            ):
                lengths = Lengths(prompt_tokens=64, answer_tokens=answer_tokens)
                plan = closed(count=count, lengths=lengths, vocabulary=VOCABULARY, seed=count)
                report = summarise(await run_closed_loop(plan, driver, concurrency=concurrency))
                figures[name] = {
                    "failed": report.failed,
                    "ttft_ms_p50": report.ttft_ms.p50,
                    "ttft_ms_p99": report.ttft_ms.p99,
                    "requests_per_s": report.request_throughput,
                    "tokens_per_s": report.output_throughput,
                    "us_per_token": 1e6 / report.output_throughput,
                }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = EngineSettings(num_blocks=256, max_num_seqs=32)
    answers = {"requests": arguments.requests, "answer_tokens": arguments.answer_tokens}
    default = build(CHECKPOINTS / "trireme-py-6m", settings=settings)
    null = Engine(NullModel(), settings, eos_token_ids=frozenset(), model_key="null")
    bare = floor.measured()
    way_ms = floor_of_the_way(bare)
    over_null = asyncio.run(alternate(null, _null_document(), **answers))
    figures = {
        "floor": {**bare, "way_ms": way_ms},
        "over_the_engine": asyncio.run(alternate(default, fleet_document(workers=1), **answers)),
        "over_a_null_engine": {
            **over_null,
            "added_ttft_over_the_floor": over_null["added_ttft_ms_p50"] / way_ms,
        },
        "ceilings_with_a_null_engine": asyncio.run(ceilings(arguments.requests)),
    }
    path = write_result("overhead", figures)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
