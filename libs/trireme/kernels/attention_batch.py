"""What one step's attention needs to know: whose tokens, how much context, which blocks.

Built once per step on the host and shared by all layers. Plans (gather indices and masks)
are made on first use, one per window width, and kept for the step's other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.kernels.tree_paths import MAX_TREE_TOKENS, hidden_keys, mask_bits

_GROUP_SPREAD: Final = 2
"""Decoding sequences share a padded gather while the longest has at most this many times the
blocks of the shortest."""
_GROUP_MIN_BLOCKS: Final = 8
"""Below this length padding is cheaper than another gather."""
_SHORT_CHUNK: Final = 16
"""Chunks of at most so many queries, of which a batch that verifies drafts has many, share calls."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length that are attended to in one call."""

    rows: Tensor | None
    """(sequences,) int64: their tokens in the batch; None: all decoding sequences, in order."""
    blocks: Tensor
    """(sequences * width,) int64: their blocks, padded with the first one's."""
    run_start: int | None
    """The blocks are run_start, run_start + 1, ...: they can be read in place."""
    num_sequences: int
    width: int
    """Blocks per sequence after padding."""
    start: int
    """First key of the gathered ones that is used. Not 0 only for a group of one."""
    stop: int
    """One past the last key that is used. Short of the width only for a group of one."""
    mask: Tensor | None
    """(sequences, 1, 1, width * block_size), added to the scores; None: nothing is masked."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One prefill chunk."""

    first_token: int
    num_tokens: int
    blocks: Tensor
    """(width,) int64: the blocks that hold the keys seen by any query of the chunk."""
    run_start: int | None
    """As for a decode group."""
    start: int
    stop: int
    """Keys used, of the gathered ones."""
    mask: Tensor | None
    """(num_tokens, stop - start), added to the scores; None with `is_causal` or one query."""
    is_causal: bool
    """The chunk starts its sequence: plain causal attention."""


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Short chunks of sequences of similar length, attended to in one call: drafts that are verified."""

    queries: Tensor
    """(sequences * num_queries,) int64: their tokens in the batch, padded with each one's first."""
    tokens: Tensor
    """(tokens,) int64: their tokens in the batch, without padding."""
    places: Tensor
    """(tokens,) int64: where those stand in `queries`."""
    blocks: Tensor
    """(sequences * width,) int64: their blocks, padded with the first one's."""
    run_start: None
    """They do not lie side by side."""
    num_sequences: int
    num_queries: int
    """Per sequence, after padding."""
    width: int
    """Blocks per sequence, after padding."""
    mask: Tensor
    """(sequences, num_queries, width * block_size), added to the scores."""
    _repeated: dict[int, Tensor]

    def mask_of_heads(self, heads_per_key: int) -> Tensor:
        """The mask for query heads that stand as a key head's queries, each with its queries in order:
        (sequences, 1, heads_per_key * num_queries, width * block_size)."""
        mask = self._repeated.get(heads_per_key)
        if mask is None:
            mask = self._repeated[heads_per_key] = self.mask.repeat(1, heads_per_key, 1)[:, None]
        return mask


class AttentionBatch:
    """One step's sequences, decoding ones first.

    Args:
        query_lens: tokens of each sequence in this step; those of length 1 without a tree come first.
        context_lens: tokens of each sequence in the cache after this step, these included.
        block_tables: (sequences, max_blocks) int64 on the host: row i holds the blocks of
            sequence i in order, at least ceil(context / block_size) of them.
        block_size: tokens per block.
        device, dtype: of the queries.
        trees: by sequence, where its last tokens are a tree, the parents of those (`tree_paths`), at most
            `MAX_TREE_TOKENS`. Its tokens of this step are all or the last of them; earlier ones are cached. A
            token sees its ancestors and what lies before the tree, and its position is by its depth.
    """

    __slots__ = (
        "_chunk_groups",
        "_chunks",
        "_decodes",
        "_tree_masks",
        "block_size",
        "block_tables",
        "context_lens",
        "device",
        "dtype",
        "num_decodes",
        "num_tokens",
        "query_lens",
        "slots",
        "trees",
    )

    def __init__(
        self,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: NDArray[np.int64],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        trees: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.trees = trees or {}
        assert all(query_lens[i] <= len(tree) <= MAX_TREE_TOKENS for i, tree in self.trees.items())
        self.query_lens = query_lens
        self.context_lens = context_lens
        self.block_tables = block_tables
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.num_tokens = sum(query_lens)
        num_decodes = 0
        for index, length in enumerate(query_lens):
            if length != 1 or index in self.trees:
                break
            num_decodes += 1
        self.num_decodes = num_decodes
        self.slots = self._to_device(self._slots())
        """(tokens,) int64: where each token's key and value go."""
        self._tree_masks: Tensor | None = None
        self._decodes: dict[int | None, tuple[DecodeGroup, ...]] = {}
        self._chunks: dict[int | None, tuple[ChunkPlan, ...]] = {}
        self._chunk_groups: dict[int | None, tuple[tuple[ChunkGroup, ...], tuple[ChunkPlan, ...]]] = {}

    @property
    def tree_masks(self) -> Tensor | None:
        """(tokens,) int64: `mask_bits` of the trees that begin in this step, 0 elsewhere; None: no trees."""
        if self.trees and self._tree_masks is None:
            masks = np.zeros(self.num_tokens, dtype=np.int64)
            starts = np.cumsum(self.query_lens) - self.query_lens
            for index, parents in self.trees.items():
                if self.query_lens[index] == len(parents):
                    masks[starts[index] : starts[index] + len(parents)] = mask_bits(parents)
            self._tree_masks = self._to_device(masks)
        return self._tree_masks

    def decode_groups(self, window: int | None) -> tuple[DecodeGroup, ...]:
        """The decoding sequences, in groups of similar length."""
        groups = self._decodes.get(window)
        if groups is None:
            groups = self._decodes[window] = self._plan_decodes(window)
        return groups

    def chunks(self, window: int | None) -> tuple[ChunkPlan, ...]:
        """The prefill chunks, in the order of their tokens."""
        plans = self._chunks.get(window)
        if plans is None:
            plans = self._chunks[window] = self._plan_chunks(window)
        return plans

    def chunk_groups(self, window: int | None) -> tuple[tuple[ChunkGroup, ...], tuple[ChunkPlan, ...]]:
        """The same, short ones in groups, and all others."""
        plans = self._chunk_groups.get(window)
        if plans is None:
            plans = self._chunk_groups[window] = self._plan_chunk_groups(window)
        return plans

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _slots(self) -> NDArray[np.int64]:
        size = self.block_size
        count = self.num_decodes
        last = np.asarray(self.context_lens[:count], dtype=np.int64) - 1
        parts = [self.block_tables[np.arange(count), last // size] * size + last % size]
        for index in range(count, len(self.query_lens)):
            context = self.context_lens[index]
            positions = np.arange(context - self.query_lens[index], context, dtype=np.int64)
            parts.append(self.block_tables[index, positions // size] * size + positions % size)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _plan_decodes(self, window: int | None) -> tuple[DecodeGroup, ...]:
        count, size = self.num_decodes, self.block_size
        if count == 0:
            return ()
        stop = np.asarray(self.context_lens[:count], dtype=np.int64)
        start = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)
        first_block = start // size
        widths = -(-stop // size) - first_block
        longest = int(widths.max())
        if longest <= max(_GROUP_MIN_BLOCKS, _GROUP_SPREAD * int(widths.min())):
            return (self._group(None, start, stop, first_block, longest),)

        order = np.argsort(widths, kind="stable")
        groups: list[DecodeGroup] = []
        begin = 0
        for end in range(1, count + 1):
            shortest = max(_GROUP_MIN_BLOCKS, _GROUP_SPREAD * int(widths[order[begin]]))
            if end < count and int(widths[order[end]]) <= shortest:
                continue
            rows = order[begin:end]
            width = int(widths[rows[-1]])
            groups.append(self._group(rows, start[rows], stop[rows], first_block[rows], width))
            begin = end
        return tuple(groups)

    def _group(
        self,
        rows: NDArray[np.int64] | None,
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        first_block: NDArray[np.int64],
        width: int,
    ) -> DecodeGroup:
        size = self.block_size
        count = len(start)
        table_rows = np.arange(count) if rows is None else rows
        if count == 1:
            first = int(first_block[0])
            blocks = self.block_tables[table_rows[0], first : first + width]
            bounds = int(start[0]) - first * size, int(stop[0]) - first * size
            mask = None
        else:
            columns = first_block[:, None] + np.arange(width)
            used = columns * size < stop[:, None]
            columns[~used] = 0
            blocks = self.block_tables[table_rows[:, None], columns].reshape(-1)
            bounds = 0, width * size
            keys = first_block[:, None] * size + np.arange(width * size)
            hidden = torch.from_numpy((keys >= stop[:, None]) | (keys < start[:, None]))
            zeros = torch.zeros(hidden.shape, dtype=self.dtype)
            mask = zeros.masked_fill_(hidden, float("-inf"))[:, None, None, :].to(self.device)
        return DecodeGroup(
            rows=None if rows is None else self._to_device(np.ascontiguousarray(rows)),
            blocks=self._to_device(np.ascontiguousarray(blocks)),
            run_start=_run_start(blocks) if count == 1 else None,
            num_sequences=count,
            width=width,
            start=bounds[0],
            stop=bounds[1],
            mask=mask,
        )

    def _plan_chunks(self, window: int | None) -> tuple[ChunkPlan, ...]:
        plans: list[ChunkPlan] = []
        token = self.num_decodes
        for index in range(self.num_decodes, len(self.query_lens)):
            length, context = self.query_lens[index], self.context_lens[index]
            plans.append(self._chunk(index, token, length, context, window))
            token += length
        return tuple(plans)

    def _plan_chunk_groups(self, window: int | None) -> tuple[tuple[ChunkGroup, ...], tuple[ChunkPlan, ...]]:
        lengths = np.asarray(self.query_lens, dtype=np.int64)
        short = self.num_decodes + np.flatnonzero(lengths[self.num_decodes :] <= _SHORT_CHUNK)
        if len(short) < 2:
            return (), self.chunks(window)
        first_tokens = np.cumsum(lengths) - lengths
        stop = np.asarray(self.context_lens, dtype=np.int64)
        first_query = stop - lengths
        for index, parents in self.trees.items():
            first_query[index] = stop[index] - len(parents)
        start = np.zeros_like(stop) if window is None else np.maximum(first_query - window + 1, 0)
        first_block = start // self.block_size
        widths = -(-stop // self.block_size) - first_block
        order = short[np.argsort(widths[short], kind="stable")]
        groups: list[ChunkGroup] = []
        begin = 0
        for end in range(1, len(order) + 1):
            shortest = max(_GROUP_MIN_BLOCKS, _GROUP_SPREAD * int(widths[order[begin]]))
            if end < len(order) and int(widths[order[end]]) <= shortest:
                continue
            members = order[begin:end]
            groups.append(
                self._chunk_group(
                    members, first_tokens[members], first_block[members], int(widths[members[-1]]), window
                )
            )
            begin = end
        longer = [
            self._chunk(index, int(first_tokens[index]), int(lengths[index]), int(stop[index]), window)
            for index in range(self.num_decodes, len(lengths))
            if lengths[index] > _SHORT_CHUNK
        ]
        return tuple(groups), tuple(longer)

    def _chunk_group(
        self,
        members: NDArray[np.int64],
        first_tokens: NDArray[np.int64],
        first_block: NDArray[np.int64],
        width: int,
        window: int | None,
    ) -> ChunkGroup:
        size = self.block_size
        lengths = np.asarray(self.query_lens, dtype=np.int64)[members]
        stop = np.asarray(self.context_lens, dtype=np.int64)[members]
        most = int(lengths.max())
        steps = np.arange(most)
        is_query = steps < lengths[:, None]
        steps = np.where(is_query, steps, 0)
        queries = first_tokens[:, None] + steps
        positions = (stop - lengths)[:, None] + steps  # (sequences, queries)
        columns = first_block[:, None] + np.arange(width)
        columns[columns * size >= stop[:, None]] = 0
        keys = (first_block[:, None] * size + np.arange(width * size))[:, None]  # (sequences, 1, keys)
        hidden = keys > positions[:, :, None]
        if window is not None:
            hidden |= keys <= positions[:, :, None] - window
        for row, index in enumerate(members):
            parents = self.trees.get(int(index))
            if parents is not None:
                count = int(lengths[row])
                hidden[row, :count] = hidden_keys(
                    parents, context=int(stop[row]), num_queries=count, keys=keys[row, 0], window=window
                )
                hidden[row, count:] = hidden[row, 0]
        zeros = torch.zeros(hidden.shape, dtype=self.dtype)
        return ChunkGroup(
            queries=self._to_device(queries.reshape(-1)),
            tokens=self._to_device(queries[is_query]),
            places=self._to_device(np.flatnonzero(is_query)),
            blocks=self._to_device(self.block_tables[members[:, None], columns].reshape(-1)),
            run_start=None,
            num_sequences=len(members),
            num_queries=most,
            width=width,
            mask=zeros.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(self.device),
            _repeated={},
        )

    def _chunk(self, index: int, token: int, length: int, context: int, window: int | None) -> ChunkPlan:
        size = self.block_size
        parents = self.trees.get(index)
        first_query = context - (length if parents is None else len(parents))
        start = 0 if window is None else max(0, first_query - window + 1)
        first_block = start // size
        last_block = -(-context // size)
        is_causal = (
            parents is None and first_query == 0 and length > 1 and (window is None or context <= window)
        )
        mask = None
        if parents is not None:
            keys_seen = np.arange(start, context, dtype=np.int64)
            unseen = hidden_keys(parents, context=context, num_queries=length, keys=keys_seen, window=window)
            mask = torch.zeros(unseen.shape, dtype=self.dtype)
            mask = mask.masked_fill_(torch.from_numpy(unseen), float("-inf")).to(self.device)
        elif not is_causal:
            queries = torch.arange(first_query, context)[:, None]
            keys = torch.arange(start, context)
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=self.dtype)
            mask = mask.masked_fill_(hidden, float("-inf")).to(self.device)
        blocks = self.block_tables[index, first_block:last_block]
        return ChunkPlan(
            first_token=token,
            num_tokens=length,
            blocks=self._to_device(np.ascontiguousarray(blocks)),
            run_start=_run_start(blocks),
            start=start - first_block * size,
            stop=context - first_block * size,
            mask=mask,
            is_causal=is_causal,
        )


def _run_start(blocks: NDArray[np.int64]) -> int | None:
    """The first of `blocks` if each is the one after the one before."""
    first, last = int(blocks[0]), int(blocks[-1])
    is_run = last - first == len(blocks) - 1 and bool((blocks[1:] > blocks[:-1]).all())
    return first if is_run else None
