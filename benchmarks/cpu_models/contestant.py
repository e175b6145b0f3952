"""One implementation with one model in a process of its own, asked for figures line by line.

A process each, because the four keep their libraries in environments of their own, and their thread pools out
of each other's way. Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

Open = Callable[[Path, int, str], "Contestant"]
"""Takes where the model is, the number of threads and the type of the weights."""

MOST_SEQUENCES = 16
CONTEXT = 512
"""Tokens that a sequence may have, prompt and answer."""


class Contestant(Protocol):
    """What is measured. Sequences are greedy and never share anything with those before."""

    description: str
    """Versions, and what it computes in."""
    step_bytes: int
    """Bytes of weights that a step of decoding has to read: all but an embedding that serves as no head."""

    def logits(self, tokens: Sequence[int]) -> Sequence[float]:
        """Scores of all tokens after the last of `tokens`."""

    def prefill_s(self, tokens: Sequence[int]) -> float:
        """Seconds until the token after the prompt is chosen."""

    def decode_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Seconds of one step that gives all sequences a token: the mean of so many after prefill."""


def answer_requests(open_contestant: Open) -> None:
    """Run a contestant's process: open the model that the command line names, then answer until the end."""
    # Libraries print to standard output as they please: it becomes standard error for them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="")
    arguments = parser.parse_args()
    contestant = open_contestant(arguments.model, arguments.threads, arguments.dtype)
    about = {"description": contestant.description, "step_bytes": contestant.step_bytes}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        found: object
        match request["ask"]:
            case "logits":
                found = [float(score) for score in contestant.logits(request["tokens"])]
            case "prefill":
                found = contestant.prefill_s(request["tokens"])
            case _:
                found = contestant.decode_s(request["prompts"], request["steps"])
        print(json.dumps(found), file=answers, flush=True)
