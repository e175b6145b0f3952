"""Recorded requests: Azure 2023, Mooncake and agentic sessions, each possibly gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from trireme.errors import InvalidConfiguration
from trireme.simulator.requests import Request, on_tick

MOONCAKE_BLOCK_TOKENS = 512
DATA = Path(__file__).resolve().parents[3] / "benchmarks" / "data" / "traces"
SHIPPED = {
    "azure-conv": "azure2023_conv_10min.csv",
    "azure-code": "azure2023_code_10min.csv.gz",
    "mooncake-conversation": "mooncake_conversation_40min.jsonl.gz",
    "agentic": "agentic_sessions.jsonl.gz",
}
"""Traces that the repository ships, by name, under `benchmarks/data/traces`."""


def find(name: str) -> Path:
    """The file of a shipped trace's name, or of a path.

    Raises:
        InvalidConfiguration: neither exists.
    """
    path = DATA / SHIPPED[name] if name in SHIPPED else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(known for known, file in SHIPPED.items() if (DATA / file).is_file()))
        raise InvalidConfiguration(
            f"there is no trace {name!r}: give a file, or one of {known}", param="--trace"
        )
    return path


def read(
    path: Path, *, limit: int | None = None, sessions_per_s: float = 0.1, closed: bool = False, seed: int = 0
) -> list[Request]:
    """The requests of a trace, in order of arrival.

    CSV: `t_s`, `context_tokens`, `generated_tokens` (Azure). JSON lines: Mooncake's requests, or one
    agentic session per line.

    Args:
        limit: requests to take from the start.
        sessions_per_s: agentic sessions share no clock: they start as a Poisson process of this rate.
        closed: a turn of a session comes `think_s` after the answer before it, not at its recorded time.
        seed: of the sessions' starts.

    Raises:
        InvalidConfiguration: the file cannot be read or has another form.
    """
    try:
        if ".csv" in path.suffixes:
            found = _azure(path, limit)
        else:
            found = _json_lines(path, limit, sessions_per_s, closed, seed)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InvalidConfiguration(f"cannot read {path}: {error}", param="--trace") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"a row has no {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidConfiguration(
            f"{path} is not an Azure, Mooncake or agentic trace: {what}", param="--trace"
        ) from error
    if not found:
        raise InvalidConfiguration(f"{path} holds no requests", param="--trace")
    return found


def _azure(path: Path, limit: int | None) -> list[Request]:
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        requests = []
        for index, row in enumerate(reader):
            if limit is not None and index >= limit:
                break
            requests.append(
                Request(
                    f"r{index}",
                    on_tick(float(row["t_s"])),
                    max(1, int(row["context_tokens"])),
                    max(1, int(row["generated_tokens"])),
                )
            )
    return requests


def _json_lines(
    path: Path, limit: int | None, sessions_per_s: float, closed: bool, seed: int
) -> list[Request]:
    rng = random.Random(seed)
    requests: list[Request] = []
    with _open(path) as lines:
        rows = (json.loads(line) for line in lines if line.strip())
        session_starts_s = 0.0
        for index, row in enumerate(rows):
            if limit is not None and len(requests) >= limit:
                break
            if "requests" not in row:
                requests.append(_mooncake(index, row))
                continue
            requests.extend(_session(index, row, session_starts_s, closed))
            session_starts_s += rng.expovariate(sessions_per_s)
    requests.sort(key=lambda request: request.arrival_s)
    return requests if limit is None else _without_orphans(requests[:limit])


def _mooncake(index: int, row: Mapping[str, Any]) -> Request:
    return Request(
        f"r{index}",
        on_tick(row["timestamp"] / 1000),
        max(1, row["input_length"]),
        max(1, row["output_length"]),
        block_runs=tuple(_runs(row.get("hash_ids", ()))),
        block_tokens=MOONCAKE_BLOCK_TOKENS,
    )


def _session(index: int, session: Mapping[str, Any], starts_s: float, closed: bool) -> Iterator[Request]:
    """Ids of blocks are the session's own: they are made unique by its place in the file."""
    base = index << 32
    previous = ""
    for turn, row in enumerate(sorted(session["requests"], key=_time)):
        request_id = f"s{index}.{turn}"
        yield Request(
            request_id,
            on_tick(starts_s + row["t"]),
            max(1, row["in"]),
            max(1, row["out"]),
            session_id=f"s{index}",
            after=previous if closed else "",
            think_s=on_tick(max(0.0, row.get("think_s") or 0.0)) if closed else 0.0,
            block_runs=tuple((base + first, count) for first, count in row["runs"]),
            block_tokens=session["block_size"],
        )
        previous = request_id


def _time(row: Mapping[str, Any]) -> float:
    return cast(float, row["t"])


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or ids[index] != ids[index - 1] + 1:
            yield ids[start], index - start
            start = index


def _without_orphans(requests: list[Request]) -> list[Request]:
    """A turn whose predecessor was cut off comes at its own time."""
    ids = {request.request_id for request in requests}
    return [r if not r.after or r.after in ids else r._replace(after="", think_s=0.0) for r in requests]


def _open(path: Path) -> TextIO:
    opened: Callable[..., TextIO] = cast(Callable[..., TextIO], gzip.open if path.suffix == ".gz" else open)
    return opened(path, "rt", encoding="utf-8")
