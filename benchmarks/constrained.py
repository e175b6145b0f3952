"""Decoding under a constraint against plain decoding, in one process, in turns.

    python -m benchmarks.constrained [--variant trireme-py-6m] [--sequences 8] [--rounds 5]

Every sequence writes the same number of tokens. A figure is the median over the rounds of tokens per second;
a ratio below 1 is what the masks cost. `mixed` is the speed of plain sequences and constrained ones together,
half and half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from benchmarks.fleet import CHECKPOINTS, write_result
from trireme.constraints.constraint import Constraint, ConstraintKind
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, build

ANSWER_TOKENS = 96
CONSTRAINTS = {
    "schema": Constraint(
        ConstraintKind.JSON_SCHEMA,
        json.dumps({"type": "array", "minItems": 400, "items": {"type": "object", "properties": {"a": {}}}}),
    ),
    "regex": Constraint(ConstraintKind.REGEX, r"([a-z]{3,9} [0-9]{1,4}, ){400}"),
}


def tokens_per_s(engine: Engine, constraints: list[Constraint | None]) -> float:
    """One answer for each, all together; the constraints are compiled before the clock starts."""
    for number, constraint in enumerate(constraints):
        engine.add(
            SequenceRequest(
                sequence_id=f"{number}",
                prompt_token_ids=[number + 1, 50, 60, 70],
                sampling=SamplingParams(
                    max_tokens=ANSWER_TOKENS,
                    seed=number,
                    constraint=constraint,
                    logit_bias=dict.fromkeys(engine.eos_token_ids, -100.0),
                ),
            )
        )
    written = 0
    while written < len(constraints):  # everybody's first token: prefill and compiling are over
        written += len(engine.step().outputs)
    started_s, first = time.perf_counter(), written
    while engine.has_work:
        written += len(engine.step().outputs)
    return (written - first) / (time.perf_counter() - started_s)


def measure(engine: Engine, *, sequences: int, rounds: int) -> dict[str, object]:
    """Medians over rounds in which each kind has its turn."""
    half = sequences // 2
    kinds: dict[str, list[Constraint | None]] = {"plain": [None] * sequences}
    for name, constraint in CONSTRAINTS.items():
        kinds[name] = [constraint] * sequences
    kinds["mixed"] = [CONSTRAINTS["schema"]] * half + [None] * (sequences - half)
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, constraints in kinds.items():
            speeds[name].append(tokens_per_s(engine, constraints))
    medians = {name: statistics.median(found[1:]) for name, found in speeds.items()}
    return {
        "tokens_per_s": {name: round(speed, 1) for name, speed in medians.items()},
        "ratio_to_plain": {
            name: round(speed / medians["plain"], 3) for name, speed in medians.items() if name != "plain"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="trireme-py-6m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = build(CHECKPOINTS / arguments.variant, settings=EngineSettings(num_blocks=1024, block_size=16))
    result = measure(engine, sequences=arguments.sequences, rounds=arguments.rounds)
    result |= {"variant": arguments.variant, "sequences": arguments.sequences, "rounds": arguments.rounds}
    print(json.dumps(result, indent=2))
    write_result("constrained", result)


if __name__ == "__main__":
    main()
