"""Which tokens of a sequence the model has before it, where those that do not fit are cut.

    history         | prompt as it came | answer so far                    |
    token_ids       | head | history from head + dropped on: what stays    |
    whole           | head | dropped before it came | history from head on |

What stays after a cut was computed while the dropped tokens were visible. So a sequence whose KV
is lost is not computed from what stays: it is led through its history again from where its KV
depends on nothing else, window by window and cut by cut, and goes on with the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme.engine.request import SequenceRequest
from trireme.errors import InvalidRequest
from trireme.kvcache.block_identity import HashChain, chain_after_cut
from trireme.policies.kv_truncation import (
    MAX_ROTATIONS,
    TruncationPlan,
    TruncationRule,
    plan_truncation,
    rotations,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Between two cuts."""

    cuts: tuple[int, ...]
    """Where the rest began after each cut so far, counted in the whole conversation."""
    chain: HashChain
    """Of the tokens that stay."""


@dataclass(slots=True, eq=False, kw_only=True)
class ContextWindow:
    """One sequence's, owned by it."""

    rule: TruncationRule
    borders: tuple[int, ...]
    """Where turns begin, counted in the whole conversation."""
    came_with: int
    """Tokens that had been dropped before the request came."""
    history: list[int]
    """Prompt as it came, and answer."""
    stage: Stage
    base: Stage
    """The latest whose KV depends on the tokens that stay alone."""
    _told: int = 0

    @property
    def head_blocks(self) -> int:
        """Blocks that every cut keeps."""
        return self.rule.head // self.rule.block_size

    @property
    def dropped(self) -> int:
        """Tokens of `history` that are gone."""
        return self._dropped(self.stage)

    @property
    def num_kept(self) -> int:
        """Tokens of `history` that are not gone; the window may not hold them all yet."""
        return len(self.history) - self.dropped

    def plan(self, num_tokens: int, *, reserved_tokens: int = 1) -> TruncationPlan:
        """What becomes of a window with so many tokens in it."""
        stage = self.stage
        gone = stage.cuts[-1] - self.rule.head if stage.cuts else 0
        return plan_truncation(
            self.rule,
            num_tokens + gone,
            reserved_tokens=reserved_tokens,
            borders=self.borders,
            made=stage.cuts,
        )

    def is_rotated_too_often(self, plan: TruncationPlan) -> bool:
        """The keys that would stay have been rounded enough: they are computed again."""
        return rotations(plan, self.rule, plan.cut) > MAX_ROTATIONS

    def follow(self, plan: TruncationPlan, *, is_base: bool, is_unseen: bool = False) -> int:
        """Carry out the cuts of a plan; returns how many tokens go.

        Args:
            is_base: what stays is computed again, from itself.
            is_unseen: it was never computed with what goes.
        """
        before = self.dropped
        for number, cut in enumerate(plan.cuts, start=1):
            if number > len(self.stage.cuts):
                self._cut(cut, number, is_unseen=is_unseen)
        if is_base:
            self.base = self.stage
        return self.dropped - before

    def restart(self) -> int:
        """The KV is lost: go back to `base`; returns how many tokens are no longer gone."""
        before = self.dropped
        self.stage = self.base
        return before - self.dropped

    def fill(self, token_ids: list[int]) -> None:
        """Extend what the window holds as far as the history goes and the window is not full."""
        start, stop = len(token_ids), min(self.num_kept, self.rule.window - 1)
        token_ids.extend(self.history[start + self.dropped : stop + self.dropped])

    def refilled(self) -> list[int]:
        """What the window holds first, after `restart`."""
        token_ids = self.history[: self.rule.head]
        self.fill(token_ids)
        return token_ids

    def news_of_dropped(self) -> int | None:
        """Tokens of `history` that are gone, if that was not told yet."""
        if self.dropped == self._told:
            return None
        self._told = self.dropped
        return self._told

    def dropped_at_end(self) -> int:
        """Tokens of the whole `history` that had gone when its last token was chosen."""
        plan = self.plan(self.num_kept - 1)
        return plan.dropped - self.came_with

    def _dropped(self, stage: Stage) -> int:
        return stage.cuts[-1] - self.rule.head - self.came_with if stage.cuts else 0

    def _cut(self, cut: int, number: int, *, is_unseen: bool) -> None:
        stage, head, size = self.stage, self.rule.head, self.rule.block_size
        before = stage.cuts[-1] if stage.cuts else head
        start = head + self._dropped(stage)
        gone = [*self.history[:head], *self.history[start : start + cut - before]]
        hashes = stage.chain.extend((), gone, size)
        gone_blocks = (cut - before) // size
        chain = chain_after_cut(stage.chain, hashes, head // size, gone_blocks, number, is_unseen=is_unseen)
        self.stage = Stage((*stage.cuts, cut), chain)


def open_window(
    request: SequenceRequest, *, max_model_len: int, block_size: int, can_rotate: bool
) -> ContextWindow | None:
    """The window of a request that may be cut; None where it must fit.

    A prompt that the engine cannot hold is cut at once. What stays of it is computed from itself.

    Raises:
        InvalidRequest: the cuts that were made before are not of whole blocks.
        ContextLengthExceeded: what must be kept leaves no room.
    """
    truncation = request.truncation
    if truncation is None:
        return None
    if any(offset % block_size for offset in (truncation.head_tokens, *truncation.cuts)):
        raise InvalidRequest(f"cuts must be of whole blocks of {block_size} tokens", param="truncation")
    rule = TruncationRule(window=max_model_len, block_size=block_size, pinned_tokens=truncation.head_tokens)
    if truncation.cuts and rule.head != truncation.head_tokens:
        raise InvalidRequest("a cut must keep the first block", param="truncation")
    stage = Stage(truncation.cuts, request.chain)
    window = ContextWindow(
        rule=rule,
        borders=truncation.borders,
        came_with=truncation.cuts[-1] - rule.head if truncation.cuts else 0,
        history=list(request.prompt_token_ids),
        stage=stage,
        base=stage,
    )
    plan = window.plan(len(window.history), reserved_tokens=request.sampling.max_tokens)
    if len(window.history) >= rule.window:
        window.follow(plan, is_base=True, is_unseen=can_rotate)
    window.history += request.delivered_token_ids
    if not can_rotate:
        window.follow(window.plan(window.num_kept), is_base=True)
    return window
