"""One engine's speculation: asks the drafters before a step, learns from it afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from trireme.engine.batch import Part
from trireme.engine.kv_cache import KvCache
from trireme.engine.request import Mode
from trireme.engine.sequence import Sequence
from trireme.engine.settings import EngineSettings
from trireme.engine.speculation.draft_beside import BesideDrafter
from trireme.engine.speculation.draft_model import ModelDrafter
from trireme.engine.speculation.draft_readers import DraftReaders
from trireme.engine.speculation.draft_tree import TreeDrafter
from trireme.engine.speculation.proposals import NOTHING, Drafter, Proposal, Want
from trireme.engine.speculation.repetitions import RepetitionDrafter
from trireme.engine.speculation.token_tree import TokenTree
from trireme.models.model import Model
from trireme.policies.speculation import SpeculationController

log = logging.getLogger(__name__)


class Speculator:
    """Owned by an `Engine`.

    Args:
        cache: of the target; asked for blocks that drafted tokens write to.
        controller: decides and learns.
        max_model_len: longest sequence.
        max_batch_tokens: of a step, drafted ones included.
        reserve_blocks: blocks that drafts leave to others.
        drafters: beside the sequence's own repetitions, in the order in which they are asked.
        clock: seconds.
    """

    def __init__(
        self,
        cache: KvCache,
        controller: SpeculationController,
        *,
        max_model_len: int,
        max_batch_tokens: int,
        reserve_blocks: int,
        drafters: Seq[Drafter] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.controller = controller
        self._cache = cache
        self._max_model_len = max_model_len
        self._max_batch_tokens = max_batch_tokens
        self._reserve_blocks = reserve_blocks
        own = (RepetitionDrafter(controller.chance),) if controller.settings.matches else ()
        self._drafters: tuple[Drafter, ...] = (*own, *drafters)
        self._clock = clock
        self._batch = 0
        """Decoding sequences of the step, if there is nothing else in it."""
        self._proposals: dict[Sequence, tuple[Drafter, Proposal]] = {}
        self._drafting_s = 0.0
        self._num_drafted = 0

    def propose(self, parts: Seq[Part]) -> dict[Sequence, TokenTree]:
        """Drafted tokens of the step's decoding sequences; they hold blocks for them."""
        self._proposals = {}
        self._drafting_s, self._num_drafted = 0.0, 0
        decoding = [part.sequence for part in parts if _decodes(part)]
        batch = len(decoding)
        self._batch = batch if batch == len(parts) else 0
        room = self._max_batch_tokens - sum(count for _, count in parts)
        if not batch or room <= 0 or not self.controller.is_on(batch):
            return {}
        started_s = self._clock()
        wants = [want for sequence in decoding if (want := self._want(sequence)) is not None]
        offered = self._ask(wants, batch)
        lengths = self.controller.choose(
            [proposal.reaches for _, proposal in offered.values()], batch=batch, room=room
        )
        by_id = {sequence.sequence_id: sequence for sequence in decoding}
        drafts: dict[Sequence, TokenTree] = {}
        for (name, (drafter, proposal)), length in zip(offered.items(), lengths, strict=True):
            sequence = by_id[name]
            length = self._held(sequence, length)
            if length:
                taken = proposal.head(length).arranged()
                drafts[sequence] = taken.tree
                self._proposals[sequence] = drafter, taken
                self._num_drafted += length
        self._drafting_s = self._clock() - started_s
        return drafts

    def observe(self, sequence: Sequence, path: Seq[int]) -> None:
        """Of what was drafted for the sequence the tokens at these places were right.

        To be called for each that was verified to its first wrong token; not for one that ended before.
        """
        drafter, proposal = self._proposals[sequence]
        if proposal.parents is None:
            self.controller.observe_draft(proposal.marks, len(path))
            drafter.observe(sequence.sequence_id, proposal.marks, len(path))
            return
        right = {-1, *path}
        for place, (mark, parent) in enumerate(zip(proposal.marks, proposal.parents, strict=True)):
            if parent in right:
                self.controller.observe_token(mark, is_right=place in right)
        trunk = proposal.trunk()
        drafter.observe(
            sequence.sequence_id, trunk.marks, sum(place == index for index, place in enumerate(path))
        )

    def end_step(self, seconds: float, *, num_tokens: int) -> None:
        """The step that `propose` was asked for is over, and gave so many tokens."""
        if self._batch:
            self.controller.observe_step(
                batch=self._batch,
                drafted=self._num_drafted,
                tokens=num_tokens,
                seconds=seconds,
                drafting_s=self._drafting_s,
            )

    def forget(self, sequence_id: str) -> None:
        """The sequence has ended."""
        for drafter in self._drafters:
            drafter.forget(sequence_id)

    def close(self) -> None:
        """End what drafters have running."""
        for drafter in self._drafters:
            drafter.close()

    def _want(self, sequence: Sequence) -> Want | None:
        """What may be drafted so that no verified token lies behind the end or behind a cut."""
        params = sequence.request.sampling
        left = params.max_tokens - sequence.num_outputs
        length, window = len(sequence.token_ids), sequence.window
        limit = self._max_model_len if window is None else window.rule.window
        most = min(self.controller.settings.most, left - 1, limit - length - 1)
        if most < 1:
            return None
        history = sequence.token_ids if window is None else window.history
        settings, state = self.controller.settings, sequence.state
        # The masks of a constraint are made for one continuation.
        branches = settings.branches if state is None or state.guide is None else 1
        most_in_all = min(settings.most_in_all, limit - length - 1)
        return Want(sequence.sequence_id, history, most, params.is_greedy, left, branches, most_in_all)

    def _ask(self, wants: list[Want], batch: int) -> dict[str, tuple[Drafter, Proposal]]:
        """The drafter that has something for a sequence and its proposal, in the order of the drafters."""
        offered: dict[str, tuple[Drafter, Proposal]] = {}
        for drafter in self._drafters:
            rest = [want for want in wants if want.sequence_id not in offered]
            if not rest:
                break
            try:
                proposals = [
                    proposal if proposal is NOTHING else proposal.ranked(want)
                    for want, proposal in zip(rest, drafter.propose(rest, batch=batch), strict=True)
                ]
            except Exception:
                # Nobody's answer depends on a draft: decoding goes on without this drafter.
                log.exception("drafter_failed", extra={"drafter": type(drafter).__name__})
                self._drafters = tuple(other for other in self._drafters if other is not drafter)
                drafter.close()
                continue
            for want, proposal in zip(rest, proposals, strict=True):
                if proposal is not NOTHING and proposal.tokens:
                    offered[want.sequence_id] = drafter, proposal
        return offered

    def _held(self, sequence: Sequence, length: int) -> int:
        """Drafted tokens, at most `length`, that the sequence has blocks for or gets some for."""
        if not length:
            return 0
        cache = self._cache
        stop = len(sequence.token_ids) + length
        missing = cache.blocks_for(stop) - len(sequence.blocks)
        if missing <= 0:
            return length
        if cache.pool.num_available - missing >= self._reserve_blocks and cache.grow(sequence, stop):
            return length
        return max(0, len(sequence.blocks) * cache.block_size - len(sequence.token_ids))


def _decodes(part: Part) -> bool:
    """Its one token is its newest, and the next one is chosen from its scores."""
    sequence, count = part
    return (
        count == 1
        and sequence.mode is Mode.GENERATE
        and sequence.num_computed + 1 == len(sequence.token_ids)
        and not sequence.is_replaying
    )


def speculator_of(
    cache: KvCache,
    target: Model,
    settings: EngineSettings,
    *,
    max_model_len: int,
    draft: Model | None,
    drafters: Seq[Drafter],
    clock: Callable[[], float],
) -> Speculator | None:
    """What the settings of an engine ask for; None: it does not speculate.

    Raises:
        InvalidConfiguration: the draft model has other tokens than the target.
    """
    if settings.speculation is None:
        return None
    controller = SpeculationController(settings.speculation)
    if draft is not None:
        readers = DraftReaders(
            draft,
            target.config,
            num_blocks=settings.num_blocks,
            block_size=settings.block_size,
            max_model_len=max_model_len,
        )
        own: Drafter
        if settings.speculation.beside:
            own = BesideDrafter(readers, controller)
        elif settings.speculation.branches > 1:
            own = TreeDrafter(readers, controller, clock=clock)
        else:
            own = ModelDrafter(readers, controller, clock=clock)
        drafters = (own, *drafters)
    return Speculator(
        cache,
        controller,
        max_model_len=max_model_len,
        max_batch_tokens=settings.max_batch_tokens,
        reserve_blocks=max(int(settings.watermark * settings.num_blocks), settings.max_num_seqs),
        drafters=drafters,
        clock=clock,
    )
