"""Which tokens the constraints of a batch's rows allow next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from trireme.constraints.guide import Guide

_WORD_BITS: Final = 32
Bits = np.ndarray[tuple[int, int], np.dtype[np.int32]]
"""(guided rows, words)."""


class Guided(Protocol):
    """What of a row's sampling state matters here."""

    guide: Guide | None
    ahead: tuple[int, ...]
    stop_ids: list[int]

    @property
    def suppresses_stop(self) -> bool: ...


class _Run(NamedTuple):
    """Neighbouring rows of one sequence: its next token, and one row behind each drafted token."""

    guide: Guide
    first: int
    """Among the guided rows."""
    drafted: tuple[int, ...]


def forbid(scores: Tensor, states: Sequence[Guided], rows: Sequence[int]) -> None:
    """Make what the constraints of these rows do not allow impossible, in place: see `allowed`.

    Args:
        scores: (all rows, vocab).
        rows: those with a guide, ascending.

    Raises:
        TriremeError: a constraint failed.
    """
    vocab_size = scores.shape[1]
    bits = allowed(states, rows, vocab_size)
    where = torch.tensor(rows, device=scores.device)
    flags = _unpacked(bits, vocab_size, scores.device)
    scores[where] = scores[where].masked_fill(~flags, -torch.inf)


def allowed(states: Sequence[Guided], rows: Sequence[int], vocab_size: int) -> Bits:
    """Which tokens the constraints of these rows allow: a bit each, the lowest of a word first.

    A row behind a drafted token that is not allowed itself may choose anything: nobody will ask. Where
    nothing but the end is allowed, `min_tokens` does not hold it off.

    Args:
        rows: those with a guide, ascending.

    Returns:
        (len(rows), words) int32.

    Raises:
        TriremeError: a constraint failed.
    """
    words = -(-vocab_size // _WORD_BITS)
    bits = np.full((len(rows), words), -1, dtype=np.int32)
    runs = _runs(states, rows)
    plain = [(run.guide.matcher, run.first) for run in runs if not run.drafted]
    drafting = [(run.guide.matcher, run.first, list(run.drafted)) for run in runs if run.drafted]
    if plain:
        _fill(plain, bits)
    if drafting:
        _executor(torch.get_num_threads()).unsafe_compute_mask_ptr_with_draft_token(
            drafting, bits.ctypes.data, 4 * words, len(rows)
        )
    for run in runs:
        run.guide.check()
    for place, row in enumerate(rows):
        if states[row].suppresses_stop:
            _hold_off(bits[place], states[row].stop_ids)
    return bits


def _runs(states: Sequence[Guided], rows: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    for place, row in enumerate(rows):
        guide, ahead = states[row].guide, states[row].ahead
        assert guide is not None
        if ahead and runs and runs[-1].guide is guide and len(ahead) == place - runs[-1].first:
            runs[-1] = runs[-1]._replace(drafted=ahead)
        else:
            assert not ahead, "the row of a sequence's next token comes first"
            runs.append(_Run(guide, place, ()))
    return runs


def _fill(matchers: list[tuple[LLMatcher, int]], bits: Bits) -> None:
    words = bits.shape[1]
    threads = torch.get_num_threads()
    if threads == 1 or len(matchers) == 1:
        for matcher, place in matchers:
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data + 4 * words * place, 4 * words)
    else:
        _executor(threads).unsafe_compute_mask_ptr(matchers, bits.ctypes.data, 4 * words, bits.shape[0])


@cache
def _executor(threads: int) -> LLExecutor:
    return LLExecutor(threads)


def _hold_off(row: np.ndarray[tuple[int], np.dtype[np.int32]], stop_ids: list[int]) -> None:
    """Take the stop tokens out of a row, unless nothing else is left."""
    held = row.view(np.uint32).copy()
    for token_id in stop_ids:
        held[token_id // _WORD_BITS] &= ~np.uint32(1 << (token_id % _WORD_BITS))
    if held.any():
        row[:] = held.view(np.int32)


def _unpacked(bits: Bits, vocab_size: int, device: torch.device) -> Tensor:
    """(rows, vocab) bool; 32 tokens per word travel to the device."""
    if device.type == "cpu":
        flags = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(flags).bool()
    packed = torch.from_numpy(bits).to(device, non_blocking=True)
    places = torch.arange(_WORD_BITS, dtype=torch.int32, device=device)
    return ((packed[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocab_size]
