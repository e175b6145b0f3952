"""The engine in process against transformers' `generate`: same weights, same prompts, one thread each.

    python -m benchmarks.engine [--variant trireme-py-6m] [--rounds 5]

Both run in float32 in one process, in turns; a figure is the median over the rounds. A ratio above 1 means
that the engine is faster.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.fleet import CHECKPOINTS, write_result
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, build

PROMPT_TOKENS = 64
ANSWER_TOKENS = 64


def engine_seconds(engine: Engine, prompts: list[list[int]], answer_tokens: int) -> float:
    """Seconds until all prompts have their answers."""
    salt = str(time.monotonic_ns()).encode()
    started_s = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(
            SequenceRequest(
                sequence_id=f"{number}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True),
                salt=salt,
            )
        )
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started_s


@torch.inference_mode()
def transformers_seconds(model: torch.nn.Module, prompts: list[list[int]], answer_tokens: int) -> float:
    """The same by one batched `generate`."""
    tokens = torch.tensor(prompts)
    started_s = time.perf_counter()
    model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=answer_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return time.perf_counter() - started_s


def measure(
    engine: Engine, model: torch.nn.Module, *, batch: int, prompt: int, answer: int, rounds: int
) -> dict[str, float]:
    """Both in turns; the first turn warms up."""
    rng = random.Random(batch)
    ours, theirs = [], []
    for turn in range(rounds + 1):
        prompts = [[rng.randrange(16, 4000) for _ in range(prompt)] for _ in range(batch)]
        pair = engine_seconds(engine, prompts, answer), transformers_seconds(model, prompts, answer)
        if turn:
            ours.append(pair[0])
            theirs.append(pair[1])
    mine, other = statistics.median(ours), statistics.median(theirs)
    tokens = batch * (answer if answer > 1 else prompt)
    return {
        "batch": batch,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "engine_tokens_per_s": round(tokens / mine, 1),
        "transformers_tokens_per_s": round(tokens / other, 1),
        "ratio": round(other / mine, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variant", default="trireme-py-6m")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = CHECKPOINTS / arguments.variant
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    engine = build(
        checkpoint, settings=EngineSettings(num_blocks=1024, max_num_seqs=64, max_batch_tokens=512)
    )
    rows = [
        measure(
            engine, model, batch=batch, prompt=PROMPT_TOKENS, answer=ANSWER_TOKENS, rounds=arguments.rounds
        )
        for batch in (1, 4, 16)
    ]
    rows += [
        measure(engine, model, batch=batch, prompt=length, answer=1, rounds=arguments.rounds)
        for batch, length in ((1, 256), (1, 1024), (8, 256))
    ]
    path = write_result("engine", {"variant": arguments.variant, "threads": 1, "rows": rows})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
