"""The CPU's kernels for weights of few bits, against reading the weights and against what is served today.

    python -m benchmarks.cpu_linear [--threads 2] [--rounds 9] [--formats int8_ch,bf16] [--rows 1,16]

Each product runs over copies of the weight that together exceed the caches, as the layers of a model do; a
figure is the best of the rounds, in which all candidates take turns. `of_floor` is the time of reading the
packed bytes, with as many threads, over the time of the product. `over_float32` and `over_bfloat16` are the
times of oneDNN on float32 weights packed for it, which is how float32 models are served, and of PyTorch on
bfloat16 weights and activations, over that time. With one thread the clock is that thread's CPU time: others'
work on the machine then counts only by what it takes of the memory.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fleet import write_result
from trireme.kernels import onednn
from trireme.kernels.cpu_library import CpuLibrary, cpu_library
from trireme.kernels.low_bit_cpu import PackedLinear, linear, pack, pack_bf16
from trireme.quant.formats import FORMATS
from trireme.quant.quantization import quantize

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
"""Outputs and inputs: the matrices of a model of about 850 million parameters."""
WORKING_SET_BYTES = 96 << 20
"""Of the copies of a weight together: three times the largest cache of the machines measured."""
MOST_PRODUCTS = 6e10
"""Multiplications in one turn of a candidate, so that long batches do not go over all copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way of computing the product."""

    name: str
    calls: Sequence[Callable[[Tensor], object]]
    """One for each copy of the weight."""
    nbytes: int
    """Of one copy."""
    dtype: torch.dtype = torch.float32


def copies(nbytes: int) -> int:
    return max(2, -(-WORKING_SET_BYTES // nbytes))


def few_bits(name: str, weight: Tensor, library: CpuLibrary, threads: int) -> list[Candidate]:
    """The format's kernels, and reading its bytes."""
    quantized = None if name == "bf16" else quantize(weight, FORMATS[name])

    def packed() -> PackedLinear:
        return pack_bf16(weight) if quantized is None else pack(quantized)

    first = packed()
    several = [first, *(packed() for _ in range(copies(first.nbytes) - 1))]

    def product(one: PackedLinear) -> Callable[[Tensor], object]:
        return lambda x: linear(x, one, None)

    def reading(one: PackedLinear) -> Callable[[Tensor], object]:
        return lambda _: library.read(one.words.data_ptr(), one.words.nbytes, threads)

    return [
        Candidate(name=name, calls=[product(one) for one in several], nbytes=first.nbytes),
        Candidate(name="floor", calls=[reading(one) for one in several], nbytes=first.words.nbytes),
    ]


def float32_served(weight: Tensor) -> Candidate:
    """oneDNN on packed float32."""

    def product(one: Tensor) -> Callable[[Tensor], object]:
        return lambda x: onednn.linear(x, one, None)

    calls = [product(onednn.pack(weight.clone())) for _ in range(copies(weight.nbytes))]
    return Candidate(name="float32", calls=calls, nbytes=weight.nbytes)


def bfloat16_plain(weight: Tensor) -> Candidate:
    """PyTorch on plain bfloat16."""

    def product(one: Tensor) -> Callable[[Tensor], object]:
        return lambda x: torch.nn.functional.linear(x, one)

    nbytes = weight.numel() * 2
    calls = [product(weight.to(torch.bfloat16, copy=True)) for _ in range(copies(nbytes))]
    return Candidate(name="bfloat16", calls=calls, nbytes=nbytes, dtype=torch.bfloat16)


def best_seconds(
    candidates: Sequence[Candidate], x: Tensor, products: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of one call of each candidate: the best of the rounds, after one to warm up."""
    best: dict[str, float] = {}
    for turn in range(rounds + 1):
        for candidate in candidates:
            calls = candidate.calls[: max(1, int(MOST_PRODUCTS // (products * rounds)))]
            operand = x.to(candidate.dtype)
            started_s = clock()
            for call in calls:
                call(operand)
            took_s = (clock() - started_s) / len(calls)
            if turn:
                best[candidate.name] = min(took_s, best.get(candidate.name, took_s))
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", default=",".join((*FORMATS, "bf16")))
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--case", default="", help="part of the name of the results")
    arguments = parser.parse_args()
    library = cpu_library()
    if library is None:
        raise SystemExit("there are no CPU kernels here: run python -m trireme.kernels.cpu_build")
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    found = []
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        baselines = [float32_served(weight), bfloat16_plain(weight)]
        for name, rows in itertools.product(
            arguments.formats.split(","), map(int, arguments.rows.split(","))
        ):
            ours, floor = few_bits(name, weight, library, arguments.threads)
            products = rows * outputs * inputs
            # Reading does not depend on the rows; the baselines in bfloat16 take seconds for many.
            beside = [floor, *(baselines if rows <= 16 else baselines[:1])]
            took = best_seconds([ours, *beside], torch.randn(rows, inputs), products, arguments.rounds, clock)
            seconds = took[name]
            row = {
                "format": name,
                "outputs": outputs,
                "inputs": inputs,
                "rows": rows,
                "us": round(seconds * 1e6, 1),
                "gb_per_s": round(ours.nbytes / seconds / 1e9, 2),
                "read_gb_per_s": round(floor.nbytes / took["floor"] / 1e9, 2),
                "of_floor": round(took["floor"] / seconds * ours.nbytes / floor.nbytes, 3),
                "over_float32": round(took["float32"] / seconds, 2),
            }
            if "bfloat16" in took:
                row["over_bfloat16"] = round(took["bfloat16"] / seconds, 2)
            found.append(row)
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    figures = {"threads": arguments.threads, "level": library.level.name, "rows": found}
    print(write_result("cpu_linear", figures, case=arguments.case))


if __name__ == "__main__":
    main()
