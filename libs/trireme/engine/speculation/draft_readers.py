"""A smaller model with the same tokens that reads sequences, and its own paged KV.

What it wrote for tokens that turned out wrong is overwritten. Whoever was not read for the longest time makes
way. Not for two threads at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

import torch

from trireme.engine.block_tables import BlockTables
from trireme.engine.kv_memory import KvMemory
from trireme.errors import InvalidConfiguration
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.tree_paths import depths
from trireme.kvcache.block_pool import BlockPool
from trireme.models.config import ModelConfig
from trireme.models.model import Model
from trireme.policies.speculation import Mark

SOURCE: Final = "model"
_OTHERS: Final = "model, another branch"
_GRADES: Final = 10

NextTokens = tuple[tuple[int, float], ...]
"""Tokens that may come next, the likeliest first, with the model's probability or NaN."""


@dataclass(slots=True, eq=False)
class Reader:
    """One sequence in the draft model's cache."""

    row: int
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Whose keys and values are in the blocks."""
    agreed: int = 0
    """Leading ones of them that are the sequence's."""

    def set_back(self, history: Sequence[int], length: int, guess: Sequence[int] = ()) -> None:
        """Drop what is not of the first `length` tokens of a history, or of a guess that follows them.

        The last one is dropped in any case: it is to be followed.
        """
        tokens = self.tokens
        agreed = min(self.agreed, length - 1)
        stop = min(len(tokens), length - 1)
        while agreed < stop and tokens[agreed] == history[agreed]:
            agreed += 1
        self.agreed = agreed
        if agreed == stop == length - 1 and len(tokens) > stop:
            known = (history[stop], *guess)
            while (
                agreed < min(len(tokens), length - 1 + len(guess)) and tokens[agreed] == known[agreed - stop]
            ):
                agreed += 1
        del tokens[agreed:]


class DraftReaders:
    """The model and everybody's readers.

    Args:
        model: shares the target's token ids.
        target: the target's configuration.
        num_blocks, block_size: of the draft model's own KV.
        max_model_len: longest sequence of the target.

    Raises:
        InvalidConfiguration: the vocabularies differ.
    """

    def __init__(
        self, model: Model, target: ModelConfig, *, num_blocks: int, block_size: int, max_model_len: int
    ) -> None:
        if model.config.vocab_size != target.vocab_size:
            raise InvalidConfiguration(
                f"the draft model has {model.config.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model must have the target's tokenizer"
            )
        self._model = model
        self._block_size = block_size
        self.most = min(max_model_len, model.max_positions, num_blocks * block_size)
        """Longest sequence that can be read."""
        self._memory = KvMemory(model, num_blocks=num_blocks, block_size=block_size)
        self.pool = BlockPool(num_blocks)
        self._tables = BlockTables(-(-self.most // block_size))
        self._readers: OrderedDict[str, Reader] = OrderedDict()
        """Least recently used first."""

    def stream(self) -> AbstractContextManager[object]:
        """What is computed in it runs beside what others compute; on CPUs it is for the thread to do that."""
        if self._model.device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._model.device))  # type: ignore[no-untyped-call]

    def find(self, sequence_id: str) -> Reader | None:
        """The sequence's reader, as the one that was used last."""
        reader = self._readers.get(sequence_id)
        if reader is not None:
            self._readers.move_to_end(sequence_id)
        return reader

    def open(self, sequence_id: str) -> Reader:
        """A new reader."""
        reader = self._readers[sequence_id] = Reader(self._tables.take(()))
        return reader

    def forget(self, sequence_id: str) -> None:
        """Give the reader's blocks back, if it is there."""
        reader = self._readers.pop(sequence_id, None)
        if reader is not None:
            self.pool.release(reader.blocks)
            self._tables.give_back(reader.row)

    def hold(self, reader: Reader, num_tokens: int, *, keep: Collection[str]) -> bool:
        """Blocks for so many tokens; taken from those that were not read for the longest time."""
        missing = -(-num_tokens // self._block_size) - len(reader.blocks)
        if missing <= 0:
            return True
        if self.pool.num_available < missing:
            for name in [name for name in self._readers if name not in keep]:
                self.forget(name)
                if self.pool.num_available >= missing:
                    break
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        self._tables.extend(reader.row, len(reader.blocks), fresh)
        reader.blocks.extend(fresh)
        return True

    def read(self, chunks: Sequence[tuple[Reader, Sequence[int]]]) -> None:
        """Read on, each so many tokens that it holds blocks for."""
        self._forward(sorted(chunks, key=lambda chunk: len(chunk[1])))

    def follow(self, chunks: Sequence[tuple[Reader, Sequence[int]]], count: int = 1) -> list[NextTokens]:
        """Read on; per chunk the likeliest `count` next tokens."""
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index][1]))
        found = self._likeliest(self._forward([chunks[index] for index in order]), count)
        by_chunk = dict(zip(order, found, strict=True))
        return [by_chunk[index] for index in range(len(chunks))]

    def follow_branches(
        self, trees: Sequence[tuple[Reader, Sequence[int], Sequence[int]]], count: int
    ) -> list[NextTokens]:
        """Read tokens of trees behind what was read; per token the likeliest `count` next ones.

        Args:
            trees: (reader, tokens, parents) each: of the tree whose root is the last token that was read and
                whose last are these, as `kernels.tree_paths` has them. The others were read by earlier calls,
                in this order, and the blocks are held.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        contexts: list[int] = []
        for reader, tokens, parents in trees:
            base = len(reader.tokens) - 1
            token_ids.extend(tokens)
            positions.extend((base + depths(parents)[-len(tokens) :]).tolist())
            contexts.append(base + len(parents))
        batch = self._batch(
            [reader for reader, _, _ in trees],
            [len(tokens) for _, tokens, _ in trees],
            contexts,
            dict(enumerate(parents for _, _, parents in trees)),
        )
        return self._likeliest(self._compute(token_ids, positions, batch), count)

    def _likeliest(self, hidden: torch.Tensor, count: int) -> list[NextTokens]:
        scores = self._model.logits(hidden)
        best = scores.topk(min(count, scores.shape[1]), -1) if count > 1 else scores.max(-1, keepdim=True)
        shares = (best.values - scores.logsumexp(-1, keepdim=True)).exp()
        tokens: list[list[int]] = best.indices.tolist()
        return [tuple(zip(*row, strict=True)) for row in zip(tokens, shares.tolist(), strict=True)]

    def _forward(self, chunks: Sequence[tuple[Reader, Sequence[int]]]) -> torch.Tensor:
        """Run chunks, shortest first; the last hidden state of each: (chunks, hidden)."""
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
        batch = self._batch([reader for reader, _ in chunks], lengths, contexts, None)
        hidden = self._compute(token_ids, positions, batch)
        for reader, tokens in chunks:
            reader.tokens.extend(tokens)
        if len(last) == len(token_ids):
            return hidden
        return hidden[torch.tensor(last, device=self._model.device)]

    def _batch(
        self,
        readers: Sequence[Reader],
        lengths: Sequence[int],
        contexts: Sequence[int],
        trees: Mapping[int, Sequence[int]] | None,
    ) -> AttentionBatch:
        return AttentionBatch(
            query_lens=lengths,
            context_lens=contexts,
            block_tables=self._tables.read(
                [reader.row for reader in readers], -(-max(contexts) // self._block_size)
            ),
            block_size=self._block_size,
            device=self._model.device,
            dtype=self._model.dtype,
            trees=trees,
        )

    def _compute(
        self, token_ids: Sequence[int], positions: Sequence[int], batch: AttentionBatch
    ) -> torch.Tensor:
        inputs = torch.tensor((token_ids, positions), dtype=torch.int64)
        inputs = inputs.to(self._model.device, non_blocking=True)
        return self._model.forward(inputs[0], inputs[1], self._memory.layers, batch)


def mark_of(share: float, *, is_greedy: bool, is_likeliest: bool = True) -> Mark:
    """What is known of a token to which the draft model gives such a probability."""
    return Mark(SOURCE if is_likeliest else _OTHERS, min(_GRADES - 1, int(_GRADES * share)), is_greedy)
