"""Choosing tokens on CUDA: penalties, sampling with counter-based draws, verification of speculated tokens.

The rules, and the draws, are those of `trireme.engine.sampling`: the same (seed, index) gives the same token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.kernels.cuda_launch import Geometry, Kernel, Launcher, ShapeMismatch, ceil_div, check
from trireme.kernels.cuda_transfers import upload
from trireme.kernels.tree_paths import MAX_TREE_TOKENS

MAX_VOCAB: Final = 1 << 22
SAMPLE: Final = Kernel(source="sample", name="sample")
VERIFY_DRAFTS: Final = Kernel(source="verify_drafts", name="verify_drafts")
BIAS_LOGITS: Final = Kernel(source="adjust_logits", name="bias_logits")
PENALISE_LOGITS: Final = Kernel(source="adjust_logits", name="penalise_logits")
FORBID_LOGITS: Final = Kernel(source="adjust_logits", name="forbid_logits")
_SCRATCH_BYTES: Final = 8 * (2048 + 16 + 3) + 8
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRows:
    """How each row of a batch chooses, on the device of its scores."""

    temperatures: Tensor
    """(rows,) float32; 0: the likeliest token."""
    top_k: Tensor
    """(rows,) int32; 0: all."""
    top_p: Tensor
    """(rows,) float64; 1: all."""
    min_log: Tensor
    """(rows,) float32, logarithm of min_p; -infinity: all."""
    seeds: Tensor
    """(rows,) int64, the bits of unsigned ones."""
    indices: Tensor
    """(rows,) int64, the token's index in its answer."""

    @staticmethod
    def of(
        *,
        temperatures: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seeds: Sequence[int],
        indices: Sequence[int],
        device: torch.device,
    ) -> SamplingRows:
        """From one number a row each."""
        wishes = wishes_of(
            temperatures=temperatures, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds, vocab=MAX_VOCAB
        )
        columns = upload({**wishes, "indices": np.asarray(indices, dtype=np.int64)}, device)
        return SamplingRows(**columns)


def wishes_of(
    *,
    temperatures: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    seeds: Sequence[int],
    vocab: int,
) -> dict[str, NDArray[Any]]:
    """The fields of `SamplingRows` but the indices, on the host, from one number a row each."""
    # The least float32 that a relative score must reach to reach the exact logarithm.
    logs = [math.log(share) if share > 0.0 else -math.inf for share in min_p]
    rounded = [np.float32(log) for log in logs]
    limits = [
        float(np.nextafter(near, np.float32(np.inf)) if near < log else near)
        for near, log in zip(rounded, logs, strict=True)
    ]
    return {
        "temperatures": np.asarray(temperatures, dtype=np.float32),
        "top_k": np.asarray([min(count, vocab) for count in top_k], dtype=np.int32),
        "top_p": np.asarray(top_p, dtype=np.float64),
        "min_log": np.asarray(limits, dtype=np.float32),
        "seeds": np.asarray([seed & _MASK for seed in seeds], dtype=np.uint64).view(np.int64),
    }


def sample(launcher: Launcher, logits: Tensor, rows: SamplingRows) -> Tensor:
    """Choose a token per row.

    Args:
        logits: (rows, vocab) float32, bias and penalties applied; rows may be strided; vocab at most 2**22.
        rows: how each chooses.

    Returns:
        (rows,) int64; -1 where a row has a NaN, +infinity, or nothing above -infinity.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    count, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB:
        raise ShapeMismatch(f"logits have {vocab} columns; 1 to {MAX_VOCAB} can be sampled")
    _check_logits(logits)
    for tensor, name, dtype in (
        (rows.temperatures, "temperatures", torch.float32),
        (rows.top_k, "top_k", torch.int32),
        (rows.top_p, "top_p", torch.float64),
        (rows.min_log, "min_log", torch.float32),
        (rows.seeds, "seeds", torch.int64),
        (rows.indices, "indices", torch.int64),
    ):
        check(tensor, name, shape=(count,), dtype=dtype, device=logits.device)
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count:
        launcher.launch(
            SAMPLE,
            Geometry(grid=(count, 1, 1), threads=512, shared_bytes=_SCRATCH_BYTES),
            [
                logits,
                rows.temperatures,
                rows.top_k,
                rows.top_p,
                rows.min_log,
                rows.seeds,
                rows.indices,
                tokens,
                np.int32(vocab),
                np.int64(logits.stride(0)),
            ],
        )
    return tokens


def bias_logits(launcher: Launcher, logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values to single scores, in place; -infinity makes a token impossible.

    Args:
        logits: (rows, vocab) float32, rows may be strided.
        rows, ids: (count,) int32, distinct pairs.
        values: (count,) float32.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    count = rows.shape[0]
    _check_logits(logits)
    for tensor, name, dtype in (
        (rows, "rows", torch.int32),
        (ids, "ids", torch.int32),
        (values, "values", torch.float32),
    ):
        check(tensor, name, shape=(count,), dtype=dtype, device=logits.device)
    if count:
        launcher.launch(
            BIAS_LOGITS,
            Geometry(grid=(ceil_div(count, 256), 1, 1), threads=256),
            [logits, rows, ids, values, np.int32(count), np.int64(logits.stride(0))],
        )


def forbid_logits(launcher: Launcher, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Make tokens impossible, in place; a score that is no number stays none.

    Args:
        logits: (any, vocab) float32, rows may be strided.
        rows: (count,) int32, which of them; distinct.
        bits: (count, ceil(vocab / 32)) int32 seen as bits, the lowest first; 1: the token is allowed.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    count, vocab = rows.shape[0], logits.shape[1]
    words = ceil_div(vocab, 32)
    _check_logits(logits)
    check(rows, "rows", shape=(count,), dtype=torch.int32, device=logits.device)
    check(bits, "bits", shape=(count, words), dtype=torch.int32, device=logits.device)
    if count:
        launcher.launch(
            FORBID_LOGITS,
            Geometry(grid=(ceil_div(vocab, 1024), count, 1), threads=256),
            [logits, rows, bits, np.int32(vocab), np.int32(words), np.int64(logits.stride(0))],
        )


def penalise_logits(
    launcher: Launcher,
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    ahead: Tensor,
    penalties: Tensor,
) -> None:
    """Repetition over prompt and answer, then frequency and presence over the answer, in place.

    Args:
        logits: (any, vocab) float32, rows may be strided.
        rows: (count,) int32, which of them; distinct.
        slots: (count,) int32, each one's row of `counts` and `in_prompt`.
        counts: (slots, vocab) float32, how often each token is in the answer.
        in_prompt: (slots, vocab) bool.
        ahead: (count, most) int32, drafted tokens that count as if they were in the answer, and -1.
        penalties: (count, 3) float32: repetition, frequency, presence.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.
    """
    count, vocab = rows.shape[0], logits.shape[1]
    held, most = counts.shape[0], ahead.shape[1]
    _check_logits(logits)
    for tensor, name, shape, dtype in (
        (rows, "rows", (count,), torch.int32),
        (slots, "slots", (count,), torch.int32),
        (counts, "counts", (held, vocab), torch.float32),
        (in_prompt, "in_prompt", (held, vocab), torch.bool),
        (ahead, "ahead", (count, most), torch.int32),
        (penalties, "penalties", (count, 3), torch.float32),
    ):
        check(tensor, name, shape=shape, dtype=dtype, device=logits.device)
    if count:
        launcher.launch(
            PENALISE_LOGITS,
            Geometry(grid=(ceil_div(vocab, 1024), count, 1), threads=256),
            [
                logits,
                rows,
                slots,
                counts,
                in_prompt,
                ahead,
                penalties,
                np.int32(most),
                np.int32(vocab),
                np.int64(logits.stride(0)),
            ],
        )


class Verified(NamedTuple):
    """What the model confirmed of each sequence's drafts."""

    path: Tensor
    """(sequences, longest) int32: places of the confirmed tokens, in their order, then -1."""
    counts: Tensor
    """(sequences,) int32: how many those are."""
    next_tokens: Tensor
    """(sequences,) int64: what the model chose after the last confirmed one; -1: it had no scores."""


def verify_drafts(
    launcher: Launcher,
    chosen: Tensor,
    drafts: Tensor,
    parents: Tensor,
    starts: Sequence[int],
    *,
    starts_there: Tensor | None = None,
) -> Verified:
    """Walk each sequence's tree of drafts as far as the model's own choices go.

    Args:
        chosen: (tokens,) int64, what the model chose after each token, each with the draw of its own index.
        drafts: (tokens,) int64, the tokens; a sequence's first is its last certain one.
        parents: (tokens,) int32, place within the sequence of the token before; -1 of the first.
        starts: first token of each sequence, and the end of the last; a sequence has 1 to 64 tokens.
        starts_there: the same (sequences + 1,) int32 on the device; None: it is brought there.

    Raises:
        ShapeMismatch: a shape, type, device or layout differs from the above.

    Source: Miao et al., SpecInfer, ASPLOS 2024 (verification of token trees).
    """
    tokens = chosen.shape[0]
    for tensor, name, dtype in (
        (chosen, "chosen", torch.int64),
        (drafts, "drafts", torch.int64),
        (parents, "parents", torch.int32),
    ):
        check(tensor, name, shape=(tokens,), dtype=dtype, device=chosen.device)
    sizes = np.diff(starts)
    if (
        len(starts) < 2
        or starts[0] != 0
        or starts[-1] != tokens
        or sizes.min() < 1
        or sizes.max() > MAX_TREE_TOKENS
    ):
        raise ShapeMismatch(
            f"starts must rise from 0 to {tokens} in steps of 1 to {MAX_TREE_TOKENS}, not {list(starts)}"
        )
    sequences, longest = len(sizes), max(1, int(sizes.max()) - 1)
    if starts_there is None:
        starts_there = upload({"starts": np.asarray(starts, dtype=np.int32)}, chosen.device)["starts"]
    check(starts_there, "starts", shape=(len(starts),), dtype=torch.int32, device=chosen.device)
    path = torch.empty((sequences, longest), dtype=torch.int32, device=chosen.device)
    counts = torch.empty(sequences, dtype=torch.int32, device=chosen.device)
    next_tokens = torch.empty(sequences, dtype=torch.int64, device=chosen.device)
    launcher.launch(
        VERIFY_DRAFTS,
        Geometry(grid=(ceil_div(sequences, 4), 1, 1), threads=128),
        [
            chosen,
            drafts,
            parents,
            starts_there,
            path,
            counts,
            next_tokens,
            np.int32(sequences),
            np.int32(longest),
        ],
    )
    return Verified(path, counts, next_tokens)


def _check_logits(logits: Tensor) -> None:
    check(
        logits,
        "logits",
        shape=(None, None),
        dtype=torch.float32,
        device=logits.device,
        is_contiguous=False,
        alignment_bytes=4,
    )
    if logits.stride(1) != 1:
        raise ShapeMismatch("the rows of logits are not contiguous")
