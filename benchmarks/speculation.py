"""Speculation against plain decoding: the same engine, model and prompts, in one process, in turns.

    python -m benchmarks.speculation [--variant trireme-py-16m] [--temperature 0] [--batches 1 2 4 8 16 32]
        [--drafters "both" "both, trees"]
    python -m benchmarks.speculation --exact 1000 [--variant trireme-py-6m]

Prompts are pieces of the modules that the checkpoints' training held out. Every batch of them is answered by
all engines, a few steps of each in turn; a speedup is the plain engine's seconds over another's, summed over
all batches but the first, so plain is 1. Seconds are the process's own on a processor (`speedup`) and those
on the wall (`wall_speedup`), which differ where others use the machine too. The second form answers so many
prompts and compares every token.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from tokenizers import Tokenizer

from benchmarks.fleet import CHECKPOINTS, write_result
from checkpoints.corpus import read_corpus
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest
from trireme.loading.whole import load_model
from trireme.models.checkpoint import Checkpoint
from trireme.models.model import Model
from trireme.policies.speculation import SpeculationSettings

DRAFT = "trireme-py-1m"
PROMPT_TOKENS = 160
ANSWER_TOKENS = 96
BRANCHES = 3
"""Of one token, where drafts are trees."""
TURN_STEPS = 8
"""Steps of an engine before it is another's turn."""
END = object()
_BLOCKS = 1024


@dataclass(slots=True)
class Run:
    """One engine and what it took."""

    engine: Engine
    cpu_s: float = 0.0
    wall_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)


def prompts_of(count: int, *, seed: int) -> list[list[int]]:
    """Pieces of held-out modules."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / DRAFT / "tokenizer.json"))
    modules = [
        tokenizer.encode(module.text, add_special_tokens=False).ids for module in read_corpus().held_out
    ]
    modules = [ids for ids in modules if len(ids) > 2 * PROMPT_TOKENS]
    rng = random.Random(seed)
    starts = [
        (number, start) for number, ids in enumerate(modules) for start in range(len(ids) - PROMPT_TOKENS)
    ]
    return [modules[number][start : start + PROMPT_TOKENS] for number, start in rng.sample(starts, count)]


def engines_of(variant: str, drafters: list[str] | None = None) -> dict[str, Engine]:
    """Plain; drafts from the answer's own repetitions; from the small model; from both; each as trees."""
    with Checkpoint(CHECKPOINTS / variant) as checkpoint:
        eos = checkpoint.eos_token_ids
    target, draft = load_model(CHECKPOINTS / variant), load_model(CHECKPOINTS / DRAFT)

    def engine(speculation: SpeculationSettings | None, drafter: Model | None = None) -> Engine:
        settings = EngineSettings(
            num_blocks=_BLOCKS, max_num_seqs=64, max_batch_tokens=512, speculation=speculation
        )
        return Engine(target, settings, eos_token_ids=eos, draft=drafter)

    made: dict[str, Callable[[], Engine]] = {"plain": lambda: engine(None)}
    for suffix, branches in (("", 1), (", trees", BRANCHES)):
        own = SpeculationSettings(branches=branches)
        alone = SpeculationSettings(branches=branches, matches=False)
        made["repetitions" + suffix] = partial(engine, own)
        made["draft model" + suffix] = partial(engine, alone, draft)
        made["both" + suffix] = partial(engine, own, draft)
    return {name: make() for name, make in made.items() if not drafters or name in ("plain", *drafters)}


def answer(
    run: Run, prompts: list[list[int]], *, temperature: float, batch: int, counts: bool = True
) -> Iterator[None]:
    """Answer prompts, `batch` of them at a time, a few steps between two items."""
    engine, before = run.engine, run.engine.stats()
    salt = str(time.monotonic_ns()).encode()
    waiting = list(enumerate(prompts))[::-1]
    open_sequences = 0
    run.tokens = {}
    while waiting or engine.has_work:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for _ in range(TURN_STEPS):
            while waiting and open_sequences < batch:
                number, prompt = waiting.pop()
                open_sequences += 1
                sampling = SamplingParams(
                    max_tokens=ANSWER_TOKENS, temperature=temperature, seed=number, ignore_eos=True
                )
                engine.add(
                    SequenceRequest(
                        sequence_id=f"{number}", prompt_token_ids=prompt, sampling=sampling, salt=salt
                    )
                )
            for output in engine.step().outputs:
                assert output.token_id is not None
                run.tokens.setdefault(output.sequence_id, []).append(output.token_id)
                open_sequences -= output.finish_reason is not None
            if not (waiting or engine.has_work):
                break
        if counts:
            run.cpu_s += time.process_time() - cpu_s
            run.wall_s += time.perf_counter() - wall_s
        yield
    if counts:
        after = engine.stats()
        run.drafted += after.drafted_tokens - before.drafted_tokens
        run.accepted += after.accepted_tokens - before.accepted_tokens
        run.steps += after.steps - before.steps


def in_turns(work: list[Iterator[None]]) -> None:
    """Do all of it, a little of each at a time: what the machine does otherwise meets all alike."""
    while work:
        work = [each for each in work if next(each, END) is not END]


def speed(
    variant: str, *, temperature: float, batches: list[int], rounds: int, drafters: list[str] | None
) -> Iterator[dict[str, object]]:
    """A row per batch size and engine."""
    for batch in batches:
        runs = {name: Run(engine) for name, engine in engines_of(variant, drafters).items()}
        group = max(2 * batch, 6)
        prompts = prompts_of(group * (rounds + 1), seed=batch)
        differing = dict.fromkeys(runs, 0)
        for turn in range(rounds + 1):
            mine = prompts[turn * group : (turn + 1) * group]
            names = list(runs)
            in_turns(
                [
                    answer(runs[name], mine, temperature=temperature, batch=batch, counts=turn > 0)
                    for name in names[turn % len(names) :] + names[: turn % len(names)]
                ]
            )
            for name, run in runs.items():
                plain = runs["plain"].tokens
                differing[name] += sum(run.tokens[key] != plain[key] for key in plain)
        plain_run = runs["plain"]
        for name, run in runs.items():
            yield {
                "batch": batch,
                "drafter": name,
                "speedup": round(plain_run.cpu_s / run.cpu_s, 3),
                "wall_speedup": round(plain_run.wall_s / run.wall_s, 3),
                "steps": run.steps,
                "drafted": run.drafted,
                "accepted": run.accepted,
                "accepted_share": round(run.accepted / max(1, run.drafted), 3),
                "answers_that_differ": differing[name],
            }


def exact(variant: str, *, temperature: float, count: int) -> dict[str, object]:
    """Every token of so many answers, plain and with each drafter, always drafting and as it pays."""
    engines = engines_of(variant)
    with_all = engines.pop("draft model")
    plain = Run(engines["plain"])
    prompts = prompts_of(count, seed=0)
    in_turns([answer(plain, prompts, temperature=temperature, batch=16)])
    found: dict[str, object] = {}

    def always(speculation: SpeculationSettings) -> Engine:
        settings = EngineSettings(
            num_blocks=_BLOCKS, max_num_seqs=64, max_batch_tokens=512, speculation=speculation
        )
        return Engine(
            with_all.model,
            settings,
            eos_token_ids=with_all.eos_token_ids,
            draft=load_model(CHECKPOINTS / DRAFT),
        )

    for name, engine in (
        ("as it pays", engines["both"]),
        ("four tokens always", always(SpeculationSettings(fixed_tokens=4))),
        ("trees as they pay", engines["both, trees"]),
        ("trees of eight tokens always", always(SpeculationSettings(fixed_tokens=8, branches=BRANCHES))),
    ):
        run = Run(engine)
        in_turns([answer(run, prompts, temperature=temperature, batch=16)])
        differing = [key for key in plain.tokens if run.tokens[key] != plain.tokens[key]]
        found[name] = {
            "answers": len(plain.tokens),
            "tokens": sum(map(len, plain.tokens.values())),
            "answers_that_differ": len(differing),
            "drafted": run.drafted,
            "accepted": run.accepted,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variant", default="trireme-py-16m")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafters", nargs="+", help="measure these alone, beside plain decoding")
    parser.add_argument("--exact", type=int, default=0, help="compare the tokens of so many answers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = f"{arguments.variant}_{arguments.temperature:g}"
    figures: dict[str, object] = {
        "variant": arguments.variant,
        "draft": DRAFT,
        "temperature": arguments.temperature,
        "threads": 1,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
    }
    if arguments.exact:
        case = f"exact_{case}"
        figures |= exact(arguments.variant, temperature=arguments.temperature, count=arguments.exact)
    else:
        rows = []
        for row in speed(
            arguments.variant,
            temperature=arguments.temperature,
            batches=arguments.batches,
            rounds=arguments.rounds,
            drafters=arguments.drafters,
        ):
            print(row, flush=True)
            rows.append(row)
        figures["rows"] = rows
    path = write_result("speculation", figures, case=case)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
