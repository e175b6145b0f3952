"""What to drop when a conversation outgrows the model's window.

Pure. The gateway, the worker and the engine call `plan_truncation` with equal arguments and cut
alike; nothing is remembered from turn to turn.

    | head: kept | dropped so far | the rest: kept |        the rest moves left by cut - head
    0            head             cut              tokens

A cut drops at least `ratio` of what is not head and is then left alone until the window overflows
again, so the next turns find the blocks of this one. It falls on the start of a turn where there
is one within reach. The cuts of a conversation follow from its tokens alone: each looks only at
what was there when the window overflowed, so a conversation that grows repeats its cuts.

Source: Gao et al., CachedAttention, USENIX ATC 2024 (truncation ratio); the head that stays after
Xiao et al., StreamingLLM, ICLR 2024; turn borders, whole blocks and the standing cut are our own.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from trireme.errors import ContextLengthExceeded

T = TypeVar("T")

MAX_ROTATIONS = 4
"""A block whose keys were rotated so often is computed again instead: each time rounds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationRule:
    """How sequences of one model are cut.

    Raises:
        ContextLengthExceeded: the pinned tokens leave no room to cut in.
    """

    window: int
    """Tokens that fit, prompt and answer."""
    block_size: int
    """Tokens per KV block: what stays moves by whole blocks."""
    pinned_tokens: int = 0
    """First tokens that are never dropped, such as a system prompt."""
    sink_tokens: int = 4
    """First tokens that are kept in any case: attention rests on them."""
    ratio: float = 0.5
    """Share of the tokens behind the head that a cut drops at least, in (0, 1)."""

    def __post_init__(self) -> None:
        assert self.window > 0 and self.block_size > 0 and 0.0 < self.ratio < 1.0
        if self.least_drop >= self.window - self.head:
            raise ContextLengthExceeded(
                f"{self.pinned_tokens} pinned tokens leave no room for a conversation in a context of "
                f"{self.window} tokens: pin fewer",
                param="pinned_tokens",
            )

    @property
    def head(self) -> int:
        """Tokens kept at the start: sink and pinned prefix, rounded up to whole blocks."""
        return _up(max(self.sink_tokens, self.pinned_tokens), self.block_size)

    @property
    def least_drop(self) -> int:
        """Tokens that a cut drops at least, where no turn begins earlier and suffices."""
        return _up(max(1, math.ceil(self.ratio * (self.window - self.head))), self.block_size)

    @property
    def reach(self) -> int:
        """How far behind the one before a cut may fall to meet the start of a turn."""
        behind = self.window - self.head
        return max(
            self.least_drop, int(behind * (1.0 + self.ratio) / 2.0) // self.block_size * self.block_size
        )

    @property
    def most_reserved(self) -> int:
        """The most room that is kept free for an answer; a longer one cuts again while it is written.

        Because of this bound all that a cut may look at is there whenever the window overflows.
        """
        return self.window - self.head - self.reach


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationPlan:
    """Which tokens stay: [0, head) and [cut, num_tokens)."""

    num_tokens: int
    """Tokens before the cut."""
    head: int
    cuts: tuple[int, ...]
    """Where the rest began after each cut, ascending, whole blocks; the last one holds now."""
    reason: str

    @property
    def cut(self) -> int:
        """Where the rest begins; `head` if nothing is dropped."""
        return self.cuts[-1] if self.cuts else self.head

    @property
    def dropped(self) -> int:
        """Tokens that are gone."""
        return self.cut - self.head if self.cuts else 0

    @property
    def kept(self) -> int:
        """Tokens that stay, at positions 0 .. kept - 1."""
        return self.num_tokens - self.dropped

    def keep(self, tokens: Sequence[T]) -> list[T]:
        """What stays of the sequence, or of one that is longer."""
        return [*tokens[: self.head], *tokens[self.cut :]] if self.cuts else list(tokens)


def plan_truncation(
    rule: TruncationRule,
    num_tokens: int,
    *,
    reserved_tokens: int = 1,
    borders: Sequence[int] = (),
    made: Sequence[int] = (),
    protected_from: int | None = None,
) -> TruncationPlan:
    """Cut until what stays and `reserved_tokens` more fit the window.

    Args:
        rule: how.
        num_tokens: length of the whole conversation, with all that was ever dropped.
        reserved_tokens: room wanted for the answer; counts up to `rule.most_reserved`.
        borders: offsets at which turns begin, ascending, equal for as long as the text is.
        made: cuts so far, ascending; by the same rule they are those that this call would find.
        protected_from: tokens from here on must stay, such as the question to be answered.

    Raises:
        ContextLengthExceeded: the protected tokens alone do not fit.
    """
    room = rule.window - rule.head - max(1, min(reserved_tokens, rule.most_reserved))
    cuts = list(made)
    cut = cuts[-1] if cuts else rule.head
    while num_tokens - cut > room:
        cut = _next_cut(rule, cut, borders)
        cuts.append(cut)
    if protected_from is not None and cuts and cut > max(protected_from, rule.head):
        raise ContextLengthExceeded(
            f"the last turn has {num_tokens - protected_from} tokens; with {rule.head} that are kept before "
            f"it and room for an answer it does not fit a context of {rule.window}: shorten it"
        )
    return TruncationPlan(
        num_tokens=num_tokens,
        head=rule.head,
        cuts=tuple(cuts),
        reason=_reason(rule, num_tokens, cuts),
    )


def rotations(plan: TruncationPlan, rule: TruncationRule, token: int) -> int:
    """How often the key of a kept token can have been rotated at most, by the cuts of `plan`.

    A cut rotates what it keeps and what was computed before it: tokens that the window held.
    """
    if token < plan.head:
        return 0
    befores = (plan.head, *plan.cuts)
    behind = rule.window - rule.head
    return sum(after <= token < before + behind for before, after in zip(befores, plan.cuts, strict=False))


def turnable_blocks(rule: TruncationRule, made: Sequence[int], start: int, *, first: int, stop: int) -> int:
    """How many blocks, from the `first` of those behind a cut on, may be rotated once more.

    Args:
        made: the cuts that have rotated them, ascending.
        start: where the cut fell, in the whole conversation.
        stop: the block not to be looked at any more.
    """
    plan = TruncationPlan(num_tokens=0, head=rule.head, cuts=tuple(made), reason="")
    for block in range(first, stop):
        if rotations(plan, rule, start + block * rule.block_size) >= MAX_ROTATIONS:
            return block - first
    return max(0, stop - first)


def _next_cut(rule: TruncationRule, cut: int, borders: Sequence[int]) -> int:
    """The cut after `cut`: the first turn from `least_drop` on, else the last before, else mid-turn."""
    least, farthest = cut + rule.least_drop, cut + rule.reach
    first = bisect_left(borders, least)
    if first < len(borders) and borders[first] <= farthest:
        return borders[first] // rule.block_size * rule.block_size
    if first > 0:
        before = borders[first - 1] // rule.block_size * rule.block_size
        if before > cut:
            return before
    return least


def _reason(rule: TruncationRule, num_tokens: int, cuts: Sequence[int]) -> str:
    if not cuts:
        return f"{num_tokens} tokens fit the window of {rule.window}"
    return (
        f"{num_tokens} tokens exceed the window of {rule.window}: {rule.head}..{cuts[-1]} dropped "
        f"in {len(cuts)} cuts"
    )


def _up(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size
