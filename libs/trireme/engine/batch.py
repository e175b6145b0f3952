"""One step's batch: from sequences to tensors, through the model, to the rows that matter."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trireme.engine.decode_graphs import DecodeGraphs
from trireme.engine.kv_cache import KvCache
from trireme.engine.request import Mode
from trireme.engine.sequence import Sequence
from trireme.engine.speculation.token_tree import TokenTree
from trireme.kernels.attention_batch import AttentionBatch
from trireme.models.model import Model


class Part(NamedTuple):
    """A sequence and how many of its next tokens this step computes."""

    sequence: Sequence
    num_tokens: int


Drafts = Mapping[Sequence, TokenTree]
"""Tokens that may follow those of a sequence; computed behind its part, to be verified."""


@dataclass(slots=True)
class Computed:
    """Parts that went through the model together."""

    parts: list[Part]
    hidden: Tensor
    """(tokens, hidden), the parts' tokens one after the other, each with what was drafted for it."""
    sampling: list[Sequence]
    """Sequences that choose a token now."""
    logits: Tensor | None
    """(rows, vocab) float32: for each of `sampling` one row, and one for every token drafted for it."""
    drafts: Drafts = field(default_factory=dict)
    """What was drafted for them."""


@dataclass(slots=True)
class Fault:
    """A sequence that the model failed on, alone."""

    sequence: Sequence
    error: Exception


_NO_DRAFTS: Drafts = {}


def compute(
    model: Model,
    cache: KvCache,
    parts: list[Part],
    drafts: Drafts = _NO_DRAFTS,
    graphs: DecodeGraphs | None = None,
) -> tuple[list[Computed], list[Fault]]:
    """Run the parts in one batch. If that raises, halve it until only the culprits are left out.

    Running a part twice is harmless: it writes the same keys and values to the same slots. With `graphs`
    steps that only decode are replayed from them.
    """
    try:
        if graphs is not None and not drafts and (replayed := _replayed(model, graphs, parts)) is not None:
            return [replayed], []
        return [_forward(model, cache, parts, drafts)], []
    except Exception as error:
        if len(parts) == 1 and not drafts.get(parts[0].sequence):
            return [], [Fault(parts[0].sequence, error)]
    if len(parts) == 1:  # a draft may be any token: that the model fails on it is no fault of the sequence
        return compute(model, cache, parts)
    middle = len(parts) // 2
    computed: list[Computed] = []
    faults: list[Fault] = []
    for half in (parts[:middle], parts[middle:]):
        done, failed = compute(model, cache, half, drafts)
        computed += done
        faults += failed
    return computed, faults


def _replayed(model: Model, graphs: DecodeGraphs, parts: list[Part]) -> Computed | None:
    """None: these parts are not for a graph."""
    sequences = [sequence for sequence, _ in parts]
    for sequence, count in parts:
        chooses = sequence.mode is Mode.GENERATE and not sequence.is_replaying
        if count != 1 or not chooses or sequence.num_computed + 1 != len(sequence.token_ids):
            return None
        if sequence.load is not None:
            return None
    hidden = graphs.run(
        [sequence.token_ids[-1] for sequence in sequences],
        [sequence.num_computed for sequence in sequences],
        [sequence.row for sequence in sequences],
    )
    return None if hidden is None else Computed(parts, hidden, sequences, model.logits(hidden))


def _forward(model: Model, cache: KvCache, parts: list[Part], drafts: Drafts) -> Computed:
    """`parts` with a single token come first."""
    device = model.device
    if drafts:
        parts = sorted(parts, key=lambda part: part.num_tokens + len(drafts.get(part.sequence, ())))
    token_ids: list[int] = []
    positions: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    sampling: list[Sequence] = []
    last_rows: list[int] = []
    trees: dict[int, Seq[int]] = {}
    for sequence, count in parts:
        start = sequence.num_computed
        stop = start + count
        if count == 1:
            token_ids.append(sequence.token_ids[start])
            positions.append(start)
        else:
            token_ids.extend(sequence.token_ids[start:stop])
            positions.extend(range(start, stop))
        if (
            sequence.mode is Mode.GENERATE
            and stop == len(sequence.token_ids)
            and not (sequence.is_replaying or sequence.has_no_answer)
        ):
            sampling.append(sequence)
            last_rows.append(len(token_ids) - 1)
        if drafts and (draft := drafts.get(sequence)):
            last_rows.extend(range(len(token_ids), len(token_ids) + len(draft)))
            token_ids.extend(draft.tokens)
            if draft.parents is None:
                positions.extend(range(stop, stop + len(draft)))
            else:
                trees[len(query_lens)] = draft.rooted_parents
                positions.extend([stop + depth - 1 for depth in draft.depths])
            stop += len(draft)
        query_lens.append(stop - start)
        context_lens.append(stop)

    width = cache.blocks_for(max(context_lens))
    batch = AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=cache.tables([sequence.row for sequence, _ in parts], width),
        block_size=cache.block_size,
        device=device,
        dtype=model.dtype,
        trees=trees,
    )
    layers = cache.layers_for([sequence for sequence, _ in parts])
    inputs = torch.tensor((token_ids, positions), dtype=torch.int64).to(device, non_blocking=True)
    if not sampling:
        return Computed(parts, model.forward(inputs[0], inputs[1], layers, batch), sampling, None, drafts)
    # A batch of decoding sequences alone samples every row, in order.
    is_every_row = len(last_rows) == len(token_ids)
    scored = None if is_every_row else torch.tensor(last_rows).to(device, non_blocking=True)
    hidden, logits = model.forward_scored(inputs[0], inputs[1], layers, batch, scored)
    return Computed(parts, hidden, sampling, logits, drafts)
