"""Drafts from a smaller model with the same tokens, and its KV.

It reads a sequence when it is first asked for it, and what others have given since when it is asked again;
what it wrote for drafts that were wrong is overwritten. It drafts the likeliest token, at every temperature,
as long as another step of it pays.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from trireme.engine.block_tables import BlockTables
from trireme.engine.kv_memory import KvMemory
from trireme.engine.speculation.proposals import NOTHING, Proposal, Want
from trireme.errors import InvalidConfiguration
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kvcache.block_pool import BlockPool
from trireme.models.config import ModelConfig
from trireme.models.model import Model
from trireme.policies.speculation import Mark, SpeculationController

SOURCE: Final = "model"
_GRADES: Final = 10
_READ_AT_ONCE: Final = 512
"""Tokens that the model reads in one step before it drafts."""


@dataclass(slots=True, eq=False)
class _Reader:
    """One sequence in the draft model's cache."""

    row: int
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Whose keys and values are in the blocks."""
    agreed: int = 0
    """Leading ones of them that are the sequence's."""


@dataclass(slots=True, eq=False)
class _Live:
    """A sequence that is drafted for now."""

    want: Want
    reader: _Reader
    drafted: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    together: float = 1.0


class ModelDrafter:
    """Meets `Drafter`.

    Args:
        model: shares the target's token ids.
        target: the target's configuration.
        num_blocks, block_size: of the draft model's own KV.
        max_model_len: longest sequence of the target.
        controller: asked whether a step pays, and told what it took.
        clock: seconds.

    Raises:
        InvalidConfiguration: the vocabularies differ.
    """

    def __init__(
        self,
        model: Model,
        target: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        controller: SpeculationController,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if model.config.vocab_size != target.vocab_size:
            raise InvalidConfiguration(
                f"the draft model has {model.config.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model must have the target's tokenizer"
            )
        self._model = model
        self._block_size = block_size
        self._most = min(max_model_len, model.max_positions, num_blocks * block_size)
        self._memory = KvMemory(model, num_blocks=num_blocks, block_size=block_size)
        self._pool = BlockPool(num_blocks)
        self._tables = BlockTables(-(-self._most // block_size))
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        """Least recently used first."""
        self._controller = controller
        self._clock = clock

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        controller = self._controller
        wants_all, wants = wants, self._worth_reading(wants, batch)
        live = [entry for want in wants if (entry := self._open(want, batch)) is not None]
        live = self._read(live)
        entries = {entry.want.sequence_id: entry for entry in live}
        while live:
            chances = [e.together * controller.source_chance(SOURCE, e.want.is_greedy) for e in live]
            if not controller.pays_to_draft(chances, batch=batch):
                break
            self._step(live)
            live = [entry for entry in live if self._may_go_on(entry)]
        return [
            NOTHING
            if (entry := entries.get(want.sequence_id)) is None
            else Proposal(tuple(entry.drafted), tuple(entry.marks), tuple(entry.chances))
            for want in wants_all
        ]

    def _worth_reading(self, wants: Sequence[Want], batch: int) -> Sequence[Want]:
        """Those to draft for, before anything is read for it; few, until it is known what that takes."""
        controller = self._controller
        if controller.draft_s(1) is None and controller.settings.fixed_tokens is None:
            wants = wants[:1]
        chances = [controller.source_chance(SOURCE, want.is_greedy) for want in wants]
        return wants if controller.pays_to_draft(chances, batch=batch) else ()

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        pass  # the controller knows all that is learnt of a model

    def forget(self, sequence_id: str) -> None:
        reader = self._readers.pop(sequence_id, None)
        if reader is not None:
            self._pool.release(reader.blocks)
            self._tables.give_back(reader.row)

    def _open(self, want: Want, batch: int) -> _Live | None:
        """The sequence's reader, set back to where it agrees with the sequence."""
        history = want.history
        if len(history) + want.most > self._most:
            return None
        reader = self._readers.get(want.sequence_id)
        if reader is None:
            if not self._controller.pays_to_read(
                len(history), left_tokens=want.left, batch=batch, is_greedy=want.is_greedy
            ):
                return None
            reader = self._readers[want.sequence_id] = _Reader(self._tables.take(()))
        self._readers.move_to_end(want.sequence_id)
        self._set_back(reader, history)
        return _Live(want, reader)

    @staticmethod
    def _set_back(reader: _Reader, history: Sequence[int]) -> None:
        """Drop what was drafted and not taken, and in any case the last token: it is to be followed."""
        tokens = reader.tokens
        agreed = min(reader.agreed, len(history) - 1)
        stop = min(len(tokens), len(history) - 1)
        while agreed < stop and tokens[agreed] == history[agreed]:
            agreed += 1
        del tokens[agreed:]
        reader.agreed = agreed

    def _read(self, live: list[_Live]) -> list[_Live]:
        """Read all but the last token of each; who is not done with that has to wait for the next time."""
        unread = [(entry, len(entry.want.history) - 1 - len(entry.reader.tokens)) for entry in live]
        room = _READ_AT_ONCE
        chunks: list[tuple[_Reader, Sequence[int]]] = []
        ready: list[_Live] = []
        for entry, count in unread:
            reader = entry.reader
            # The last few go with the first drafting step.
            if count < 8:
                ready.append(entry)
                continue
            taken = min(count, room)
            start = len(reader.tokens)
            if not taken or not self._hold(reader, start + taken, keep=live):
                continue
            chunks.append((reader, entry.want.history[start : start + taken]))
            room -= taken
            if taken == count:
                ready.append(entry)
        if chunks:
            started_s = self._clock()
            self._forward(sorted(chunks, key=lambda chunk: len(chunk[1])))
            self._controller.observe_read(self._clock() - started_s)
        return ready

    def _step(self, live: list[_Live]) -> None:
        """Every live sequence gets one more drafted token, or leaves the drafted as they are."""
        started_s = self._clock()
        chunks: list[tuple[_Reader, Sequence[int]]] = []
        served: list[_Live] = []
        for entry in live:
            reader = entry.reader
            tokens = [*entry.want.history[len(reader.tokens) :], *entry.drafted]
            if entry.drafted:
                tokens = entry.drafted[-1:]
            if self._hold(reader, len(reader.tokens) + len(tokens), keep=live):
                chunks.append((reader, tokens))
                served.append(entry)
            else:
                entry.together = 0.0
        if not served:
            return
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index][1]))
        hidden = self._forward([chunks[index] for index in order])
        scores = self._model.logits(hidden)
        best = scores.max(-1)
        shares = (best.values - scores.logsumexp(-1)).exp()
        found: list[list[float]] = torch.stack((best.indices.double(), shares.double())).tolist()
        for index, token, share in zip(order, *found, strict=True):
            entry = served[index]
            if not 0.0 <= share <= 1.0:  # scores that are not numbers
                entry.together = 0.0
                continue
            mark = Mark(SOURCE, min(_GRADES - 1, int(_GRADES * share)), entry.want.is_greedy)
            chance = self._controller.chance(mark)
            entry.drafted.append(int(token))
            entry.marks.append(mark)
            entry.chances.append(chance)
            entry.together *= chance
        self._controller.observe_draft_step(len(served), self._clock() - started_s)

    @staticmethod
    def _may_go_on(entry: _Live) -> bool:
        return entry.together > 0.0 and len(entry.drafted) < entry.want.most

    def _hold(self, reader: _Reader, num_tokens: int, *, keep: Sequence[_Live]) -> bool:
        """Blocks for so many tokens; taken from those that were not drafted for the longest time."""
        missing = -(-num_tokens // self._block_size) - len(reader.blocks)
        if missing <= 0:
            return True
        if self._pool.num_available < missing:
            kept = {entry.want.sequence_id for entry in keep}
            for name in [name for name in self._readers if name not in kept]:
                self.forget(name)
                if self._pool.num_available >= missing:
                    break
        fresh = self._pool.allocate(missing)
        if fresh is None:
            return False
        self._tables.extend(reader.row, len(reader.blocks), fresh)
        reader.blocks.extend(fresh)
        return True

    def _forward(self, chunks: Sequence[tuple[_Reader, Sequence[int]]]) -> torch.Tensor:
        """Run chunks, shortest first; the last hidden state of each: (chunks, hidden)."""
        device = self._model.device
        token_ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        contexts: list[int] = []
        last: list[int] = []
        for reader, tokens in chunks:
            start = len(reader.tokens)
            token_ids.extend(tokens)
            positions.extend(range(start, start + len(tokens)))
            lengths.append(len(tokens))
            contexts.append(start + len(tokens))
            last.append(len(token_ids) - 1)
        batch = AttentionBatch(
            query_lens=lengths,
            context_lens=contexts,
            block_tables=self._tables.read(
                [reader.row for reader, _ in chunks], -(-max(contexts) // self._block_size)
            ),
            block_size=self._block_size,
            device=device,
            dtype=self._model.dtype,
        )
        inputs = torch.tensor((token_ids, positions), dtype=torch.int64).to(device, non_blocking=True)
        hidden = self._model.forward(inputs[0], inputs[1], self._memory.layers, batch)
        for reader, tokens in chunks:
            reader.tokens.extend(tokens)
        if len(last) == len(token_ids):
            return hidden
        return hidden[torch.tensor(last, device=device)]
