"""What a KV tier simulation replays: turns, each a chain of stored items.

An item is a stretch of consecutive prefix blocks that every request of the trace uses wholly or not at all,
cut where it would be larger than `MAX_ITEM_TOKENS`. A block's id stands for its content and all before it.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.simulator.requests import Request

MAX_ITEM_TOKENS = 8192
_SHAREGPT_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request as the tiers see it."""

    request: Request
    chain: tuple[int, ...]
    """Items of its prompt, in order."""
    saves: tuple[int, ...]
    """Items that are stored when it ends; begins with `chain`."""


@dataclass(frozen=True, slots=True)
class TurnTrace:
    """Turns in order of arrival, and how many tokens each item holds."""

    turns: tuple[Turn, ...]
    item_tokens: tuple[int, ...]
    users: tuple[tuple[int, ...], ...] = field(repr=False)
    """Per item: positions in `turns` of those whose prompt has it, ascending."""

    @property
    def total_tokens(self) -> int:
        """Distinct tokens stored over the whole trace."""
        return sum(self.item_tokens)


def as_turns(requests: Sequence[Request], *, answers: Sequence[int] | None = None) -> TurnTrace:
    """Cut the requests' blocks into items.

    Args:
        requests: in order of arrival, all with the same `block_tokens`.
        answers: per request, blocks stored beyond its prompt's: those after its last id. None where the
            trace does not name them; then an answer is stored when it comes back in a prompt.
    """
    block_tokens = requests[0].block_tokens
    longest = max(1, MAX_ITEM_TOKENS // block_tokens)
    extra = answers or [0] * len(requests)
    saved_runs = [_extended(request.block_runs, more) for request, more in zip(requests, extra, strict=True)]
    borders: set[int] = set()
    for request, saved in zip(requests, saved_runs, strict=True):
        for first, count in (*request.block_runs, *saved):
            borders.update((first, first + count))
    for saved in saved_runs:
        for first, count in saved:
            borders.update(range(first, first + count, longest))
    starts = sorted(borders)
    number: dict[int, int] = {}
    sizes: list[int] = []

    def items_of(runs: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        found = []
        for first, count in runs:
            for place in range(bisect_right(starts, first) - 1, bisect_left(starts, first + count)):
                start = starts[place]
                if start not in number:
                    number[start] = len(sizes)
                    sizes.append((starts[place + 1] - start) * block_tokens)
                found.append(number[start])
        return tuple(found)

    turns = tuple(
        Turn(request, items_of(request.block_runs), items_of(saved))
        for request, saved in zip(requests, saved_runs, strict=True)
    )
    users: list[list[int]] = [[] for _ in sizes]
    for place, turn in enumerate(turns):
        for item in turn.chain:
            users[item].append(place)
    return TurnTrace(turns, tuple(sizes), tuple(map(tuple, users)))


def linked(requests: Sequence[Request]) -> list[Request]:
    """The same requests as conversations: a turn waits for the answer of the turn that it continues.

    It continues the last request before it that has the longest prefix in common, unless that is no more
    than one block (the system prompt, which all share). The user thinks as long as between the arrivals.
    """
    last_with: dict[int, Request] = {}
    found = []
    for request in requests:
        before: Request | None = None
        for depth, block in enumerate(request.block_ids()):
            if block not in last_with:
                break
            before = last_with[block] if depth else None
        if before is not None:
            request = request._replace(after=before.request_id, think_s=request.arrival_s - before.arrival_s)
        found.append(request)
        last_with.update(dict.fromkeys(request.block_ids(), request))
    return found


def sharegpt_like(
    *, sessions: int, sessions_per_s: float, think_s: float, seed: int, longest_tokens: int = 4096
) -> TurnTrace:
    """Conversations with the turn counts of ShareGPT: 27 % single, 5.75 turns on average.

    The rest is a shifted geometric distribution. Sessions start as a Poisson process; a turn comes an
    exponential `think_s` after the answer before it. Lengths are lognormal: questions 161 and answers 338
    tokens on average, each cut at 1024. A session ends where it would exceed `longest_tokens`.

    Source of the turn counts: CachedAttention (ATC 2024), section 2; of the lengths: Kwon et al., SOSP 2023.
    """
    rng = random.Random(seed)
    several_mean = (5.75 - 0.27) / 0.73
    requests: list[Request] = []
    answers: list[int] = []
    start_s = 0.0
    for session in range(sessions):
        start_s += rng.expovariate(sessions_per_s)
        turns = 1 if rng.random() < 0.27 else 2 + _geometric(rng, several_mean - 2)
        history, base, previous, clock_s = 0, session << 20, "", start_s
        for turn in range(turns):
            question = min(1024, max(1, round(rng.lognormvariate(4.36, 1.2))))
            answer = min(1024, max(1, round(rng.lognormvariate(5.32, 1.0))))
            prompt = history + question
            if prompt + answer > longest_tokens and turn:
                break
            blocks, stored = prompt // _SHAREGPT_BLOCK, (prompt + answer) // _SHAREGPT_BLOCK
            think = rng.expovariate(1 / think_s) if turn else 0.0
            clock_s += think
            requests.append(
                Request(
                    f"s{session}.{turn}",
                    clock_s,
                    prompt,
                    answer,
                    session_id=f"s{session}",
                    after=previous,
                    think_s=think,
                    block_runs=((base, blocks),) if blocks else (),
                    block_tokens=_SHAREGPT_BLOCK,
                )
            )
            answers.append(stored - blocks)
            previous, history = f"s{session}.{turn}", prompt + answer
    order = sorted(range(len(requests)), key=lambda place: requests[place].arrival_s)
    return as_turns([requests[place] for place in order], answers=[answers[place] for place in order])


def _extended(runs: tuple[tuple[int, int], ...], more: int) -> tuple[tuple[int, int], ...]:
    if not more or not runs:
        return runs
    first, count = runs[-1]
    return (*runs[:-1], (first, count + more))


def _geometric(rng: random.Random, mean: float) -> int:
    """0, 1, 2, ... with that mean."""
    stop, count = 1 / (1 + mean), 0
    while rng.random() > stop:
        count += 1
    return count
