"""How long the engine's iterations take on this machine, by what is in them.

    python -m benchmarks.iteration_profile [--variant trireme-py-6m] [--threads 1] [--rounds 3] [--quick]

The real engine is driven over a grid: prompts alone, cut into chunks of several sizes, so that a chunk has
every length of context before it; batches of decoding sequences at several context lengths; and both
together. Each step's composition is read from its own result, so the grid need not know how the engine
batches. A sample is the median over equal compositions. A fifth of the samples is held back from the fit
and its error printed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.fleet import CHECKPOINTS, write_result
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, build
from trireme.engine.kv_memory import block_bytes
from trireme.policies.iteration_profile import Part
from trireme.simulator.engine_model import Sample, composition, fitted

BLOCK_TOKENS = 16
MAX_SEQUENCES = 64
CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2000)
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (16, 128, 512, 1024, 1900)
DECODE_STEPS = 12
MAX_DECODE_CONTEXT = 24_000
"""Tokens of all sequences together: what the arena below holds."""
NUM_BLOCKS = 2048

Steps = dict[tuple[Part, ...], list[float]]


class Driver:
    """Runs prompts on an engine and keeps every step's composition and seconds."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.steps: Steps = defaultdict(list)
        self._rng = random.Random(seed)
        self._names = itertools.count()
        self._computed: dict[str, int] = {}

    def add(self, prompt_tokens: int, answer_tokens: int) -> None:
        """A prompt that shares nothing with any other."""
        name = f"{next(self._names)}"
        tokens = tuple(self._rng.randrange(16, 4000) for _ in range(prompt_tokens))
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        request = SequenceRequest(
            sequence_id=name, prompt_token_ids=tokens, sampling=sampling, salt=name.encode()
        )
        self._computed[name] = 0
        self.engine.add(request)

    def step(self) -> None:
        """One iteration, noted."""
        result = self.engine.step()
        parts: dict[tuple[int, int], int] = defaultdict(int)
        for sequence_id, prefill_tokens, decode_tokens, _ in result.work:
            new = prefill_tokens + decode_tokens
            parts[new, self._computed[sequence_id]] += 1
            self._computed[sequence_id] += new
        if parts:
            key = tuple(sorted(Part(count, new, cached) for (new, cached), count in parts.items()))
            self.steps[key].append(result.seconds)

    def drain(self) -> None:
        """Until nobody is left."""
        while self.engine.has_work:
            self.step()


def measure(engine_of_chunk: dict[int, Engine], *, rounds: int, quick: bool) -> Steps:
    """All steps of the grid, by composition. The first round warms up and is forgotten."""
    steps: Steps = defaultdict(list)
    batches, contexts = (BATCHES[::3], CONTEXTS[:3]) if quick else (BATCHES, CONTEXTS)
    for number in range(rounds + 1):
        for chunk, engine in engine_of_chunk.items():
            driver = Driver(engine, seed=number)
            if chunk == max(engine_of_chunk):
                for prompt in PROMPTS:
                    driver.add(prompt, 1)
                    driver.drain()
                for batch, context in itertools.product(batches, contexts):
                    if batch * context <= MAX_DECODE_CONTEXT:
                        _decode(driver, batch, context)
            else:
                driver.add(1900, 1)
                driver.drain()
            for batch in (4, 16):
                for context in (64, 512):
                    _mix(driver, batch, context)
            if number:
                for key, seconds in driver.steps.items():
                    steps[key].extend(seconds)
        print(f"round {number} of {rounds}", flush=True)
    return steps


def _decode(driver: Driver, batch: int, context: int) -> None:
    """Batches that decode together; prompts go in one after the other, so that no step is too large."""
    for _ in range(batch):
        driver.add(context, DECODE_STEPS + batch)
    driver.drain()


def _mix(driver: Driver, batch: int, context: int) -> None:
    """Decoding sequences, and a prompt that is cut into chunks beside them."""
    for _ in range(batch):
        driver.add(context, 32)
    for _ in range(8):
        driver.step()
    driver.add(1024, 1)
    driver.drain()


def samples_of(steps: Steps) -> list[Sample]:
    """Medians. Steps of decoding alone differ by a token of context from one to the next: those of equally
    many sequences and nearly equal contexts (a quarter of an octave) are one sample."""
    samples: list[Sample] = []
    decoding: dict[tuple[int, int], list[tuple[float, list[float]]]] = defaultdict(list)
    for parts, seconds in steps.items():
        found = composition(parts)
        if found.new_tokens == found.sequences:
            context = found.kv_tokens / found.sequences
            decoding[found.sequences, int(4 * math.log2(context))].append((context, seconds))
        elif len(seconds) > 1:
            samples.append(Sample(parts, statistics.median(seconds)))
    for (sequences, _), members in decoding.items():
        context = statistics.fmean(context for context, _ in members)
        median_s = statistics.median(second for _, seconds in members for second in seconds)
        samples.append(Sample((Part(sequences, 1, round(context) - 1),), median_s))
    return samples


def errors_of(samples: list[Sample], seed: int) -> dict[str, float]:
    """Relative errors of a model fitted to four fifths of the samples, on the last fifth."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    held_back = len(shuffled) // 5
    model = fitted(shuffled[held_back:], name="held back")
    errors = sorted(
        abs(model.iteration_s(*composition(sample.parts)) / sample.seconds - 1)
        for sample in shuffled[:held_back]
    )
    return {
        "samples": len(samples),
        "held_back": held_back,
        "relative_error_p50": round(statistics.median(errors), 4),
        "relative_error_p90": round(errors[int(0.9 * held_back)], 4),
    }


def copy_bytes_per_s() -> float:
    """Between two arenas of host memory, one thread, the median of several."""
    source, target = (torch.zeros(64 * 2**20, dtype=torch.uint8) for _ in range(2))
    speeds = []
    for _ in range(9):
        started_s = time.perf_counter()
        target.copy_(source)
        speeds.append(source.nbytes / (time.perf_counter() - started_s))
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variant", default="trireme-py-6m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a coarser grid")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/iteration_profile.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = CHECKPOINTS / arguments.variant
    engines = {
        chunk: build(
            checkpoint,
            settings=EngineSettings(
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_TOKENS,
                max_num_seqs=min(MAX_SEQUENCES, chunk),
                max_batch_tokens=chunk,
                prefix_cache=False,
            ),
        )
        for chunk in (CHUNKS[2::2] if arguments.quick else CHUNKS)
    }
    samples = samples_of(measure(engines, rounds=arguments.rounds, quick=arguments.quick))
    model = next(iter(engines.values())).model
    kv_bytes = block_bytes(model.config, block_size=BLOCK_TOKENS, dtype=model.dtype)
    figures = {
        "variant": arguments.variant,
        "threads": arguments.threads,
        "layers": model.config.num_layers,
        "kv_bytes_per_token": kv_bytes // BLOCK_TOKENS,
        "copy_bytes_per_s": round(copy_bytes_per_s()),
        "fit": errors_of(samples, seed=0),
        "samples": [{"parts": sample.parts, "seconds": round(sample.seconds, 7)} for sample in samples],
    }
    path = write_result("iteration_profile", figures)
    if arguments.output is not None:
        path = path.rename(arguments.output)
    print(path, figures["fit"])


if __name__ == "__main__":
    main()
