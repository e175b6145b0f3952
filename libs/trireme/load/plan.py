"""What arrives when: Poisson arrivals, replayed traces, or a fixed number at once."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trireme.errors import InvalidConfiguration

TRACE_BLOCK_TOKENS = 512
"""Prompt tokens that one block id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of a run."""

    index: int
    at_s: float
    """Seconds after the run's start; 0 in a closed loop."""
    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    max_tokens: int
    tenant: str = ""
    session_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long synthetic prompts and answers are, in tokens; uniform within +- `spread`."""

    prompt_tokens: int = 64
    answer_tokens: int = 32
    spread: float = 0.0


def poisson(
    *, count: int, rate_rps: float, lengths: Lengths, vocabulary: int, seed: int, tenants: int = 1
) -> list[PlannedRequest]:
    """Open loop: `count` requests with exponential gaps, `rate_rps` per second on average."""
    rng = random.Random(seed)
    at_s = 0.0
    planned = []
    for index in range(count):
        at_s += rng.expovariate(rate_rps)
        planned.append(_synthetic(rng, index, at_s, lengths, vocabulary, tenants))
    return planned


def closed(
    *, count: int, lengths: Lengths, vocabulary: int, seed: int, tenants: int = 1
) -> list[PlannedRequest]:
    """Closed loop: all are ready at once; the driver keeps a fixed number in flight."""
    rng = random.Random(seed)
    return [_synthetic(rng, index, 0.0, lengths, vocabulary, tenants) for index in range(count)]


def from_prompts(
    path: Path, *, count: int, rate_rps: float | None, answer_tokens: int, seed: int
) -> list[PlannedRequest]:
    """Prompts from a JSON-lines file with a `prompt` (or `turns`) member, repeated up to `count`."""
    rng = random.Random(seed)
    prompts = [_prompt_of(row) for row in _json_lines(path)]
    if not prompts:
        raise InvalidConfiguration(f"{path} holds no prompts", param="prompts")
    at_s = 0.0
    planned = []
    for index in range(count):
        at_s += rng.expovariate(rate_rps) if rate_rps else 0.0
        prompt = prompts[index % len(prompts)]
        planned.append(PlannedRequest(index=index, at_s=at_s, prompt=prompt, max_tokens=answer_tokens))
    return planned


def from_trace(
    path: Path,
    *,
    limit: int,
    time_scale: float,
    length_scale: float,
    vocabulary: int,
    seed: int,
) -> list[PlannedRequest]:
    """Replay a trace: Azure 2023 (CSV) or Mooncake (JSON lines), each possibly gzipped.

    Args:
        limit: requests to take from the start.
        time_scale: trace seconds per wall second: 2 replays twice as fast.
        length_scale: factor on token counts, so that a small model can play a large one's trace.

    Raises:
        InvalidConfiguration: the file has neither form.
    """
    rng = random.Random(seed)
    per_block = max(1, round(TRACE_BLOCK_TOKENS * length_scale))
    planned = []
    for index, (at_s, prompt_tokens, answer_tokens, blocks) in enumerate(_trace_rows(path)):
        if index >= limit:
            break
        length = max(1, round(prompt_tokens * length_scale))
        if blocks:
            prompt = _from_blocks(blocks, length, per_block, vocabulary)
        else:
            prompt = _random_tokens(rng, length, vocabulary)
        planned.append(
            PlannedRequest(
                index=index,
                at_s=at_s / time_scale,
                prompt=prompt,
                max_tokens=max(1, round(answer_tokens * length_scale)),
            )
        )
    return planned


def _synthetic(
    rng: random.Random, index: int, at_s: float, lengths: Lengths, vocabulary: int, tenants: int
) -> PlannedRequest:
    def draw(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - lengths.spread, 1 + lengths.spread)))

    return PlannedRequest(
        index=index,
        at_s=at_s,
        prompt=_random_tokens(rng, draw(lengths.prompt_tokens), vocabulary),
        max_tokens=draw(lengths.answer_tokens),
        tenant=f"tenant-{index % tenants}" if tenants > 1 else "",
    )


def _random_tokens(rng: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    # The first few ids are special tokens in most vocabularies.
    return tuple(rng.randrange(min(16, vocabulary - 1), vocabulary) for _ in range(count))


def _from_blocks(blocks: Sequence[int], length: int, per_block: int, vocabulary: int) -> tuple[int, ...]:
    """Tokens in which equal leading block ids give equal leading tokens, as in the trace."""
    tokens: list[int] = []
    for place, block in enumerate(blocks):
        room = length - len(tokens)
        # What scaling rounded off is made up for by the last block, which others do not share as a whole.
        count = room if place == len(blocks) - 1 else min(per_block, room)
        tokens.extend(_random_tokens(random.Random(block), count, vocabulary))
    return tuple(tokens)


def _trace_rows(path: Path) -> Iterator[tuple[float, int, int, Sequence[int]]]:
    names = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if names and names[-1] == ".csv":
        with _open_text(path) as lines:
            reader = csv.DictReader(lines)
            if not {"t_s", "context_tokens", "generated_tokens"} <= set(reader.fieldnames or ()):
                raise InvalidConfiguration(
                    f"{path} needs the columns t_s, context_tokens and generated_tokens", param="trace"
                )
            for row in reader:
                try:
                    found = float(row["t_s"]), int(row["context_tokens"]), int(row["generated_tokens"]), ()
                except (TypeError, ValueError) as error:
                    raise InvalidConfiguration(
                        f"{path}, line {reader.line_num}: {error}", param="trace"
                    ) from error
                yield found
        return
    for row in _json_lines(path):
        try:
            yield row["timestamp"] / 1000, row["input_length"], row["output_length"], row.get("hash_ids", ())
        except KeyError as missing:
            raise InvalidConfiguration(f"{path}: a row has no {missing}", param="trace") from missing


def _prompt_of(row: dict[str, Any]) -> str:
    prompt = row.get("prompt") or (row.get("turns") or [None])[0]
    if not isinstance(prompt, str):
        raise InvalidConfiguration("each line needs a string `prompt` or a list `turns`", param="prompts")
    return prompt


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InvalidConfiguration(
                        f"{path}, line {number}: not JSON: {error}", param=str(path)
                    ) from error


def _open_text(path: Path):  # type: ignore[no-untyped-def]
    try:
        return gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}", param=str(path)) from error
