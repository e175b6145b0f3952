"""One engine step on its way to the worker: columns of numbers for the many, a pickle for the rare.

A step in which 64 sequences get one token each is 64 rows of three integers behind one header; what few
sequences have (a first token, an end, log-probabilities, scores) travels beside it.
"""

from __future__ import annotations

import pickle
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, get_type_hints


class EngineFigures(NamedTuple):
    """An engine's gauges, and its counters since it was built: those of `engine.EngineStats` by name."""

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 1
    kv_blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    errors: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    paused: int = 0
    swapped: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    swap_out_s: float = 0.0
    swap_in_s: float = 0.0
    lost_sequences: int = 0
    preload_blocks: int = 0
    preload_corrupt: int = 0
    host_in_bytes_per_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    graph_steps: int = 0


class Work(NamedTuple):
    """What one sequence cost beside a plain token."""

    handle: int
    seconds: float


class Output(NamedTuple):
    """A token that is not plain, or an end without one; see `engine.TokenOutput`."""

    handle: int
    place: int
    """Of the token in the answer."""
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error_code: str = ""
    error_message: str = ""
    cached_tokens: int | None = None
    dropped_tokens: int | None = None
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None


class Ending(NamedTuple):
    """The end of a request for scores or for a vector."""

    handle: int
    scores: tuple[float, ...] = ()
    embedding: tuple[float, ...] = ()
    cached_tokens: int = 0


class Turn(NamedTuple):
    """A sequence stopped, came back, or changed its level; see `engine.SequenceEvent`."""

    handle: int
    kind: str
    reason: str


class Chain(NamedTuple):
    """The complete blocks of a sequence that was cut while it was answered."""

    handle: int
    hashes: bytes
    """16 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNews:
    """What a step of one variant's engine made, and what the engine is now."""

    variant: str
    figures: EngineFigures = field(default_factory=EngineFigures)
    seconds: float = 0.0
    """The step's; 0: there was none."""
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    """Time of the sequences that had some."""
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """Plain tokens, flat rows of (handle, index in the answer, token id). Each costs `token_s`."""
    token_s: float = 0.0
    outputs: tuple[Output, ...] = ()
    work: tuple[Work, ...] = ()
    """Of sequences without a plain token."""
    endings: tuple[Ending, ...] = ()
    turns: tuple[Turn, ...] = ()
    """Now and then some of those that there were."""
    chains: tuple[Chain, ...] = ()
    """Where blocks of cut sequences were completed."""
    came: bytes = b""
    """Hashes of blocks that became resident since the last news, 16 bytes each."""
    left: bytes = b""
    """Hashes of blocks that left."""

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """The plain tokens: (handle, index, token id)."""
        flat = iter(self.tokens)
        return zip(flat, flat, flat, strict=True)


_KINDS = get_type_hints(EngineFigures).values()
_FIGURES = "".join("d" if kind is float else "q" for kind in _KINDS)
_HEADER = struct.Struct(f"<{_FIGURES}3dqH4I")


def pack(news: StepNews) -> bytes:
    """The news as bytes."""
    name = news.variant.encode()
    rows = news.tokens.tobytes()
    rare = (news.outputs, news.work, news.endings, news.turns, news.chains)
    rest = pickle.dumps(rare, protocol=5) if any(rare) else b""
    header = _HEADER.pack(
        *news.figures,
        news.seconds,
        news.prefill_s,
        news.token_s,
        news.prefill_tokens,
        len(name),
        len(rows),
        len(news.came),
        len(news.left),
        len(rest),
    )
    return b"".join((header, name, rows, news.came, news.left, rest))


def unpack(payload: bytes) -> StepNews:
    """The news that `pack` made bytes of."""
    values = _HEADER.unpack_from(payload)
    seconds, prefill_s, token_s, prefill_tokens, *sizes = values[len(_FIGURES) :]
    parts = []
    start = _HEADER.size
    for size in sizes:
        parts.append(payload[start : start + size])
        start += size
    name, rows, came, left, rest = parts
    tokens = array("q")
    tokens.frombytes(rows)
    outputs, work, endings, turns, chains = pickle.loads(rest) if rest else ((), (), (), (), ())
    return StepNews(
        variant=name.decode(),
        figures=EngineFigures._make(values[: len(_FIGURES)]),
        seconds=seconds,
        prefill_tokens=prefill_tokens,
        prefill_s=prefill_s,
        tokens=tokens,
        token_s=token_s,
        outputs=outputs,
        work=work,
        endings=endings,
        turns=turns,
        chains=chains,
        came=came,
        left=left,
    )
