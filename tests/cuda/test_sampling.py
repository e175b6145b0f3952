"""Tokens are chosen, and penalised, as the engine does; drafts are confirmed as a walk in Python does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from trireme.engine.sampling import SamplingState
from trireme.engine.sampling import sample as engine_sample
from trireme.engine.sampling_params import SamplingParams
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_launch import ShapeMismatch
from trireme.kernels.cuda_sampling import (
    BIAS_LOGITS,
    FORBID_LOGITS,
    PENALISE_LOGITS,
    SAMPLE,
    VERIFY_DRAFTS,
    SamplingRows,
    bias_logits,
    forbid_logits,
    penalise_logits,
    sample,
    verify_drafts,
)

CPU = torch.device("cpu")
FILTERS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"temperature": 2.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"top_k": 100000, "top_p": 0.5},
)


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare([SAMPLE, VERIFY_DRAFTS, BIAS_LOGITS, FORBID_LOGITS, PENALISE_LOGITS])


def states_of(filters: Sequence[dict[str, float]], vocab: int) -> list[SamplingState]:
    """One row each, with different seeds and lengths of answer."""
    return [
        SamplingState(
            SamplingParams(seed=(row * 0x9E3779B97F4A7C15) & (1 << 64) - 1, max_tokens=10**6, **wishes),  # type: ignore[arg-type]
            stop_ids=(),
            prompt_ids=(),
            output_ids=[0] * (row * 7 % 50),
            vocab_size=vocab,
            device=CPU,
        )
        for row, wishes in enumerate(filters)
    ]


def rows_of(states: Sequence[SamplingState]) -> SamplingRows:
    params = [state.params for state in states]
    return SamplingRows.of(
        temperatures=[p.temperature for p in params],
        top_k=[min(p.top_k, (1 << 31) - 1) for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        seeds=[p.seed for p in params],
        indices=[state.num_outputs for state in states],
        device=CPU,
    )


@pytest.mark.parametrize("vocab", [1, 7, 300, 5003])
@pytest.mark.parametrize("spread", [0.5, 3.0, 40.0])
def test_tokens_are_those_of_the_engine(emulator: Emulator, vocab: int, spread: float) -> None:
    states = states_of(FILTERS * 3, vocab)
    logits = (torch.randn(len(states), 2 * vocab) * spread)[:, vocab:]
    expected = [chosen.token_id for chosen in engine_sample(logits, states)]
    assert sample(emulator, logits, rows_of(states)).tolist() == expected


def test_equal_scores_go_by_their_ids(emulator: Emulator) -> None:
    states = states_of(FILTERS * 3, 200)
    logits = torch.randn(len(states), 200).round()
    logits[:, ::7] = -0.0
    expected = [chosen.token_id for chosen in engine_sample(logits, states)]
    assert sample(emulator, logits, rows_of(states)).tolist() == expected


def test_a_row_without_numbers_gets_no_token_and_others_do(emulator: Emulator) -> None:
    logits = torch.zeros(5, 9)
    logits[0, 3], logits[1, 8], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 1:] = -torch.inf
    states = states_of([{}] * 5, 9)
    tokens = sample(emulator, logits, rows_of(states)).tolist()
    assert tokens[:4] == [-1, -1, -1, 0]
    assert tokens == [chosen.token_id for chosen in engine_sample(logits, states)]


def test_penalties_are_those_of_their_definition(emulator: Emulator) -> None:
    vocab, chosen = 1500, torch.tensor([3, 0])
    logits = (torch.randn(4, 2 * vocab) * 3)[:, :vocab]
    slots = torch.tensor([2, 1])
    counts = torch.poisson(torch.full((3, vocab), 0.3))
    in_prompt = torch.rand(3, vocab) < 0.2
    ahead = torch.tensor([[-1, -1, -1], [7, 1499, 7]])
    counted = counts[slots]
    counted[1, 7] += 2
    counted[1, 1499] += 1
    penalties = torch.tensor([[1.3, 0.4, -0.7], [0.8, 0.0, 2.0]])
    repetition, frequency, presence = penalties[:, :, None].unbind(1)
    scores = logits[chosen]
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(in_prompt[slots] | (counted > 0), repeated, scores)
    expected = logits.clone()
    expected[chosen] = scores - frequency * counted - presence * (counted > 0)
    penalise_logits(emulator, logits, chosen.int(), slots.int(), counts, in_prompt, ahead.int(), penalties)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab", [1, 31, 64, 1500])
def test_what_is_not_allowed_becomes_impossible_and_what_is_no_number_stays_none(
    emulator: Emulator, vocab: int
) -> None:
    logits = (torch.randn(4, 2 * vocab) * 3)[:, :vocab]
    logits[3, vocab // 2], logits[3, vocab - 1] = torch.inf, torch.nan
    rows = torch.tensor([3, 0])
    flags = np.random.default_rng(vocab).random((2, vocab)) < 0.5
    bits = np.zeros((2, -(-vocab // 32) * 32), dtype=bool)
    bits[:, :vocab] = flags
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    expected = logits.clone()
    expected[rows] += torch.where(torch.from_numpy(flags), 0.0, -torch.inf)
    forbid_logits(emulator, logits, rows.int(), torch.from_numpy(packed))
    assert torch.equal(logits.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))


def test_bias_moves_single_scores(emulator: Emulator) -> None:
    logits = torch.randn(3, 300)
    rows, ids = torch.randint(3, (280,)), torch.randperm(300)[:280]
    values = torch.randn(280)
    values[::9] = -torch.inf
    expected = logits.clone()
    expected[rows, ids] += values
    bias_logits(emulator, logits, rows.int(), ids.int(), values)
    assert torch.equal(logits, expected)


def walk(chosen: Sequence[int], drafts: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    place, path = 0, []
    while True:
        children = [
            at for at, parent in enumerate(parents) if parent == place and drafts[at] == chosen[place]
        ]
        if not children:
            return path, chosen[place]
        place = children[0]
        path.append(place)


def test_drafts_are_confirmed_as_far_as_the_model_agrees(emulator: Emulator) -> None:
    generator = np.random.default_rng(7)
    sizes = [1, 2, 5, 31, 32, 33, 64, 64, 40]
    starts = np.concatenate(([0], np.cumsum(sizes))).tolist()
    # One token is frequent, so that long paths are confirmed and siblings are equal.
    chosen, drafts = (generator.random((2, starts[-1])) < 0.03).astype(np.int64)
    parents = np.concatenate(
        [[-1, *(max(0, at - int(generator.integers(1, 4))) for at in range(size - 1))] for size in sizes]
    )
    verified = verify_drafts(
        emulator,
        torch.from_numpy(chosen),
        torch.from_numpy(drafts),
        torch.from_numpy(parents.astype(np.int32)),
        starts,
    )
    longest = 0
    for sequence, (first, last) in enumerate(itertools.pairwise(starts)):
        path, next_token = walk(*(array[first:last].tolist() for array in (chosen, drafts, parents)))
        padding = [-1] * (verified.path.shape[1] - len(path))
        assert verified.path[sequence].tolist() == path + padding
        assert verified.counts[sequence] == len(path)
        assert verified.next_tokens[sequence] == next_token
        longest = max(longest, len(path))
    assert longest > 5


def test_what_the_kernels_do_not_take_is_refused(emulator: Emulator) -> None:
    rows = rows_of(states_of([{}], 4))
    with pytest.raises(ShapeMismatch, match=r"temperatures has shape \(1,\), not \(2,\)"):
        sample(emulator, torch.zeros(2, 4), rows)
    with pytest.raises(ShapeMismatch, match="logits have 0 columns"):
        sample(emulator, torch.zeros(1, 0), rows)
    many: Tensor = torch.zeros(65, dtype=torch.int64)
    with pytest.raises(ShapeMismatch, match="starts must rise from 0 to 65 in steps of 1 to 64"):
        verify_drafts(emulator, many, many, many.int(), [0, 65])
