"""Contestants in processes of their own, measured in turn."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.fleet import REPOSITORY
from trireme.kernels.cpu_library import cpu_library
from trireme.worker.engine_process import THREADS_SLEEP

PROMPT = 32
"""Tokens of each sequence before decoding is measured; 16 such prompts are one step of our engine."""
_READ_BYTES = 1 << 29


class Died(Exception):
    """A contestant's process ended; says where its last words are."""


class Running:
    """A contestant's process, once it has loaded its model; closes with the block."""

    def __init__(self, name: str, python: Path, module: str, words: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        command = [str(python), "-m", f"benchmarks.cpu_models.{module}", *words]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if module == "ours":
            environ |= THREADS_SLEEP  # as where it serves
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        about = self._answer()
        self.description: str = about["description"]
        self.step_bytes: int = about["step_bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()

    def ask(self, **request: object) -> Any:
        """The answer to one request.

        Raises:
            Died: there is none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> Died:
        return Died(f"{self.name} ended with {self._process.wait()}; see {self._log}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that is measured."""

    prompt: int
    """Tokens."""
    batch: int = 0
    """Sequences that decode at once; 0: the prompt's first token is measured."""
    steps: int = 0

    @property
    def name(self) -> str:
        """`prefill 128`, `decode 4`."""
        return f"decode {self.batch}" if self.batch else f"prefill {self.prompt}"

    @property
    def tokens(self) -> int:
        """That one measured time is for."""
        return self.batch or self.prompt


@dataclass(slots=True)
class Times:
    """Seconds of one case: of a prefill, or of a step of decoding."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per contestant, round by round."""
    read_bytes_per_s: list[float] = field(default_factory=list)
    """Of reading memory, in the same rounds."""

    def median_s(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, over: str) -> float:
        """How many times as fast `name` is as `over`: the median over the rounds."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


class ReadBandwidth:
    """Reads more than the caches hold, with as many threads as the contestants have."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._library = cpu_library()
        self._buffer = torch.ones(_READ_BYTES // 8, dtype=torch.int64)

    def bytes_per_s(self) -> float | None:
        """The best of three; None: there are no CPU kernels here to read with."""
        if self._library is None:
            return None
        took = []
        for _ in range(3):
            started = time.perf_counter()
            self._library.read(self._buffer.data_ptr(), _READ_BYTES, self._threads)
            took.append(time.perf_counter() - started)
        return _READ_BYTES / min(took)


def measure(
    contestants: Sequence[Running], case: Case, *, rounds: int, vocabulary: int, bandwidth: ReadBandwidth
) -> Times:
    """All contestants in turn, after one round to warm up; who begins changes from round to round."""
    rng = random.Random(case.name)
    times = Times(case)
    for turn in range(rounds + 1):
        prompts = [
            [rng.randrange(16, vocabulary) for _ in range(case.prompt)] for _ in range(case.batch or 1)
        ]
        first = turn % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            if case.batch:
                took_s = contestant.ask(ask="decode", prompts=prompts, steps=case.steps)
            else:
                took_s = contestant.ask(ask="prefill", tokens=prompts[0])
            if turn:
                times.seconds.setdefault(contestant.name, []).append(took_s)
        read = bandwidth.bytes_per_s() if turn and case.batch else None
        if read is not None:
            times.read_bytes_per_s.append(read)
    return times


def logit_errors(contestants: Sequence[Running], reference: Running, vocabulary: int) -> dict[str, float]:
    """How far each one's scores after a prompt are from the reference's: norm of the difference over norm."""
    rng = random.Random(0)
    tokens = [rng.randrange(16, vocabulary) for _ in range(PROMPT)]
    right = torch.tensor(reference.ask(ask="logits", tokens=tokens), dtype=torch.float64)
    errors = {}
    for contestant in contestants:
        scores = torch.tensor(contestant.ask(ask="logits", tokens=tokens), dtype=torch.float64)
        errors[contestant.name] = float((scores - right).norm() / right.norm())
    return errors


def cases(*, steps: int, batches: Sequence[int], prompts: Sequence[int]) -> list[Case]:
    """Prefills and decodings; large batches take fewer steps, since each takes longer."""
    return [
        *(Case(prompt=length) for length in prompts),
        *(Case(prompt=PROMPT, batch=batch, steps=max(2, int(steps / batch**0.5))) for batch in batches),
    ]


def row(times: Times, ours: str, step_bytes: Mapping[str, int]) -> dict[str, object]:
    """The figures of one case, as they are written down."""
    case = times.case
    read = statistics.median(times.read_bytes_per_s) if times.read_bytes_per_s else None
    found: dict[str, object] = {"case": case.name}
    if read is not None:
        found["read_gb_per_s"] = round(read / 1e9, 2)
    for name, seconds in times.seconds.items():
        median_s = times.median_s(name)
        figures = {
            "ms": round(median_s * 1e3, 3),
            "ms_least_most": [round(min(seconds) * 1e3, 3), round(max(seconds) * 1e3, 3)],
            "tokens_per_s": round(case.tokens / median_s, 1),
            "ours_is_faster_by": round(times.ratio(ours, name), 3),
        }
        if read is not None:
            figures["of_read_bandwidth"] = round(step_bytes[name] / median_s / read, 3)
        found[name] = figures
    return found
