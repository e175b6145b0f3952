"""Our engine, llama.cpp, OpenVINO and transformers on one CPU: the same weights, in turn, in one run.

    make bench-cpu                                       # installs the peers, then measures all
    make bench-cpu ARGS='--quick'                        # whether all works; figures are not kept
    make bench-cpu ARGS='--models 850m --formats int8,int4 --cases "decode 1"'

Random weights of Llama shapes with 125 and 850 million parameters, and the trained family. Prefill is the
time until the token after the prompt is chosen; decoding the mean time of a step in which each of 1, 4 or 16
sequences gets a token, after prompts of 32. All have the same threads and choose the likeliest token. All
matrices are in the format, the head included. Before anything is timed, logits are held against those of
transformers in float32. `of_read_bandwidth` is the bytes of the weights over the time of a step, over what
plain reading reaches in the same rounds. A peer that is not installed or dies is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

from benchmarks.cpu_models.bars import Bar, bars
from benchmarks.cpu_models.prepared import (
    ENTRIES,
    Entry,
    prepare,
    python_of,
    remove,
    source_checkpoint,
    transformers,
)
from benchmarks.cpu_models.random_weights import SHAPES
from benchmarks.cpu_models.turns import (
    Case,
    Died,
    ReadBandwidth,
    Running,
    cases,
    logit_errors,
    measure,
    row,
)
from benchmarks.fleet import REPOSITORY, write_result

FAMILY = ("trireme-py-1m", "trireme-py-6m", "trireme-py-16m")
MOST_ERROR_16_BIT = 0.03
"""Of logits in 16 bits against float32: rounded activations explain less, other weights much more."""


def started(stack: ExitStack, model: str, entry: Entry, options: argparse.Namespace) -> Running | str:
    """A contestant that is ready, or why there is none."""
    log = options.work / "logs" / f"{model} {entry.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    python = python_of(entry)
    if not python.exists():
        return "not installed: make bench-cpu installs it"
    try:
        path = prepare(model, entry, options.work, log)
        words = [str(path), "--threads", str(options.threads), "--dtype", entry.dtype]
        return stack.enter_context(Running(entry.name, python, entry.module, words, log))
    except subprocess.CalledProcessError as error:
        return f"its files were not written, exit status {error.returncode}: see {log}"
    except Died as death:
        return str(death)


def measured(
    model: str, form: str, wanted: list[Case], bandwidth: ReadBandwidth, options: argparse.Namespace
) -> tuple[dict[str, object], list[Bar]]:
    """One model in one format: the figures, and the bars that hold for it."""
    entries = list(ENTRIES[form])
    if form == "bf16":
        entries += [transformers(dtype) for dtype in options.transformers.split(",") if dtype]
    names = options.contestants.split(",") if options.contestants else []
    entries = [entry for entry in entries if not names or entry.name.split()[0] in names]
    config = json.loads((source_checkpoint(model, options.work) / "config.json").read_text(encoding="utf-8"))
    vocabulary = config["vocab_size"]
    with ExitStack() as stack:
        tried = {entry.name: started(stack, model, entry, options) for entry in entries}
        contestants = [each for each in tried.values() if isinstance(each, Running)]
        left_out = {name: why for name, why in tried.items() if isinstance(why, str)}
        for name, why in left_out.items():
            print(f"{model} {form}: without {name}: {why}", flush=True)
        with ExitStack() as briefly:
            reference = started(briefly, model, transformers("float32"), options)
            if isinstance(reference, str):
                raise SystemExit(f"no reference: {reference}")
            errors = logit_errors(contestants, reference, vocabulary)
        for each in contestants:
            off = errors[each.name]
            print(f"{model} {form}: {each.name}: {each.description}; logits off by {off:.2%}", flush=True)
        if form == "bf16":
            wrong = {name: error for name, error in errors.items() if error > MOST_ERROR_16_BIT}
            if wrong:
                raise SystemExit(f"{model}: logits are wrong: {wrong}")
        all_times, shares, rows = {}, {}, []
        step_bytes = {each.name: each.step_bytes for each in contestants}
        ours = entries[0].name
        for case in wanted:
            times = measure(
                contestants, case, rounds=options.rounds, vocabulary=vocabulary, bandwidth=bandwidth
            )
            figures = row(times, ours, step_bytes)
            all_times[case.name] = times
            rows.append(figures)
            mine = figures[ours]
            if isinstance(mine, dict) and "of_read_bandwidth" in mine:
                shares[case.name] = mine["of_read_bandwidth"]
            print(model, form, _line(figures), flush=True)
        about = {
            each.name: {
                "description": each.description,
                "step_megabytes": round(each.step_bytes / 1e6, 1),
                "logits_error": round(errors[each.name], 5),
            }
            for each in contestants
        }
    found: dict[str, object] = {"model": model, "format": form, "contestants": about, "left_out": left_out}
    return {**found, "rows": rows}, bars(model, form, all_times, shares)


def _line(figures: dict[str, object]) -> str:
    parts = [str(figures["case"])]
    for name, one in figures.items():
        if isinstance(one, dict):
            share = f", {one['of_read_bandwidth']:.0%} of reading" if "of_read_bandwidth" in one else ""
            parts.append(f"{name} {one['ms']} ms (x{one['ours_is_faster_by']}{share})")
    return "  ".join(parts)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=",".join((*SHAPES, *FAMILY)))
    parser.add_argument("--formats", default=",".join(ENTRIES))
    parser.add_argument("--contestants", default="", help="of trireme,llama.cpp,openvino,transformers; all")
    parser.add_argument("--cases", default="", help='"decode 1,prefill 128"; default: all')
    parser.add_argument("--transformers", default="bfloat16", help="what it computes in; float32,bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--steps", type=int, default=24, help="of decoding at batch 1 in a round")
    parser.add_argument("--quick", action="store_true", help="one round of few steps; writes no result")
    parser.add_argument("--keep", action="store_true", help="do not delete the weights afterwards")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".run" / "bench-cpu")
    parser.add_argument("--case", default="", help="suffix of the file of results")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 4
    return options


def main() -> None:
    options = parsed()
    wanted = cases(steps=options.steps, batches=(1, 4, 16), prompts=(128, 480))
    if options.cases:
        names = [name.strip() for name in options.cases.split(",")]
        wanted = [case for case in wanted if case.name in names]
    bandwidth = ReadBandwidth(options.threads)
    results: list[dict[str, object]] = []
    all_bars: list[Bar] = []
    for model in options.models.split(","):
        for form in options.formats.split(","):
            found, its_bars = measured(model, form, wanted, bandwidth, options)
            results.append(found)
            all_bars += its_bars
        if not options.keep:
            remove(model, options.work)
    for bar in all_bars:
        bound = "at most" if bar.is_ceiling else "at least"
        print(f"{'met   ' if bar.is_met else 'MISSED'} {bar.name}: {bar.measured:.3f}, {bound} {bar.wanted}")
    if options.quick:
        return
    figures: dict[str, object] = {
        "threads": options.threads,
        "rounds": options.rounds,
        "parameters": {name: shape.parameters for name, shape in SHAPES.items()},
        "models": results,
        "bars": [
            {
                "bar": bar.name,
                "wanted": bar.wanted,
                "is_ceiling": bar.is_ceiling,
                "measured": round(bar.measured, 3),
                "is_met": bar.is_met,
            }
            for bar in all_bars
        ],
    }
    print(write_result("cpu_models", figures, case=options.case))


if __name__ == "__main__":
    main()
