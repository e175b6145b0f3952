"""Sampling: exact distributions, draws that depend on (seed, index) alone, penalties by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.engine.philox import philox4x32, uniforms
from trireme.engine.sampling import SamplingState, sample
from trireme.engine.sampling_params import SamplingParams
from trireme.errors import InvalidRequest

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def state(
    vocab: int,
    *,
    prompt: Sequence[int] = (),
    outputs: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    **params: Any,
) -> SamplingState:
    return SamplingState(
        SamplingParams(max_tokens=100_000, **params),
        stop_ids=stop_ids,
        prompt_ids=prompt,
        output_ids=outputs,
        vocab_size=vocab,
        device=CPU,
    )


def choose(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    return [choice.token_id for choice in sample(logits, states)]


def expected_weights(row: Sequence[float], params: SamplingParams) -> list[tuple[int, float]]:
    """(token, weight) after all filters, in the order of the draw, by the plain definition."""
    scaled = [float(np.float32(value) / np.float32(params.temperature)) for value in row]
    if not params.has_filters:
        top = max(scaled)
        return [(token, math.exp(value - top)) for token, value in enumerate(scaled)]
    ranked = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    weights = [(token, math.exp(scaled[token] - scaled[ranked[0]])) for token in ranked]
    if params.min_p:
        weights = [(token, weight) for token, weight in weights if weight >= params.min_p]
    if params.top_k:
        weights = weights[: params.top_k]
    if params.top_p < 1.0:
        total = sum(weight for _, weight in weights)
        kept, reached = [], 0.0
        for token, weight in weights:
            if reached >= params.top_p * total:
                break
            kept.append((token, weight))
            reached += weight
        weights = kept
    return weights


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(words[:, 0].tolist()) == expected


def test_a_uniform_depends_on_seed_and_index_and_not_on_how_many_are_asked_for() -> None:
    whole = uniforms(7, 0, 100)
    assert whole == [uniforms(7, index, 1)[0] for index in range(100)]
    assert whole != uniforms(8, 0, 100)
    assert whole != uniforms(7 + (1 << 32), 0, 100)
    assert all(0.0 <= draw < 1.0 for draw in whole)
    assert abs(np.mean(uniforms(3, 0, 20_000)) - 0.5) < 0.01


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1, "top_p": 0.9, "top_k": 9},
    ],
)
def test_drawn_tokens_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    vocab, rows = 25, 20_000
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    states = [state(vocab, seed=seed, **params) for seed in range(rows)]
    counts = np.bincount(choose(row.expand(rows, vocab), states), minlength=vocab)
    weights = dict(expected_weights(row.tolist(), states[0].params))
    total = sum(weights.values())
    statistic = 0.0
    for token in range(vocab):
        expected = rows * weights.get(token, 0.0) / total
        if expected == 0.0:
            assert counts[token] == 0
        else:
            statistic += (counts[token] - expected) ** 2 / expected
    freedom = len(weights) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@given(
    seed=st.integers(0, 2**64 - 1),
    vocab=st.sampled_from([2, 9, 256, 257, 700]),
    spread=st.sampled_from([0.0, 0.01, 0.5, 4.0]),
    grid=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 255, 256, 300, 1000]),
    top_p=st.sampled_from([0.013, 0.37, 0.871, 1.0]),
    min_p=st.sampled_from([0.0, 0.0311, 0.27, 1.0]),
    index=st.integers(0, 2**33),
)
@settings(max_examples=250, deadline=None)
def test_a_draw_is_the_inverse_of_the_filtered_distribution(
    seed: int,
    vocab: int,
    spread: float,
    grid: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    index: int,
) -> None:
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(seed % 1000)) * spread
    if grid:
        row = (row * 4).round() / 4  # ties
    one = state(vocab, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    one.num_outputs = index
    (token,) = choose(row[None], [one])
    weights = expected_weights(row.tolist(), one.params)
    target = uniforms(seed, index, 1)[0] * sum(weight for _, weight in weights)
    reached = 0.0
    for candidate, weight in weights:
        before, reached = reached, reached + weight
        if candidate == token:
            assert before - 1e-5 * vocab <= target <= reached + 1e-5 * vocab
            return
    raise AssertionError("a filtered token was drawn")


def test_a_rows_choice_does_not_depend_on_its_neighbours() -> None:
    vocab = 300
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1))
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.1, "top_k": 5, "presence_penalty": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 2.0, "min_p": 0.05, "logit_bias": {4: 3.0}},
    ]

    def states() -> list[SamplingState]:
        return [state(vocab, seed=9, prompt=(1, 2), outputs=(3,), **wish) for wish in wishes]

    together = choose(logits, states())
    alone = [choose(logits[row : row + 1], [states()[row]])[0] for row in range(6)]
    turned = choose(logits.flip(0), states()[::-1])[::-1]
    assert together == alone == turned


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "presence_penalty": -0.5, "frequency_penalty": 1.1},
        {"logit_bias": {3: 5.0, 0: -100.0}, "repetition_penalty": 1.3},
    ],
)
def test_penalties_and_bias_follow_their_formulas(params: dict[str, Any]) -> None:
    vocab, prompt, outputs = 12, (1, 2, 2), [2, 5, 5, 5, 7]
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(2))
    states = [state(vocab, temperature=0.0, prompt=prompt, outputs=outputs[:3], **params) for _ in range(40)]
    for one in states:
        for token in outputs[3:]:
            one.observe(token)
    expected = []
    for row in logits.tolist():
        scores = []
        for token, value in enumerate(row):
            value += params.get("logit_bias", {}).get(token, 0.0)
            penalty = params.get("repetition_penalty", 1.0)
            if token in prompt or token in outputs:
                value = value / penalty if value > 0 else value * penalty
            value -= params.get("frequency_penalty", 0.0) * outputs.count(token)
            value -= params.get("presence_penalty", 0.0) * (token in outputs)
            scores.append(value)
        expected.append(max(range(vocab), key=scores.__getitem__))
    assert choose(logits, states) == expected


def test_stop_tokens_are_impossible_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]])
    one = state(4, temperature=0.0, min_tokens=2, stop_ids=(0, 1))
    chosen = []
    for _ in range(3):
        (token,) = choose(logits, [one])
        one.observe(token)
        chosen.append(token)
    assert chosen == [2, 2, 0]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    raw = logits.log_softmax(-1)
    states = [
        state(50, temperature=0.0, logprobs=3, logit_bias={7: 50.0}),
        state(50, temperature=0.5, logprobs=0, seed=4, top_k=5),
    ]
    first, second = sample(logits, states)
    assert first.token_id == 7
    assert first.logprob == pytest.approx(raw[0, 7].item())
    top = raw[0].topk(3)
    assert [token for token, _ in first.top_logprobs] == top.indices.tolist()
    assert [value for _, value in first.top_logprobs] == pytest.approx(top.values.tolist())
    assert second.logprob == pytest.approx(raw[1, second.token_id].item())
    assert second.top_logprobs == ()


def test_scores_that_are_not_numbers_spoil_their_own_row_only() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(6))
    wishes: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"logprobs": 2}]
    good = choose(logits, [state(30, **wish) for wish in wishes])
    for spoiled in range(4):
        broken = logits.clone()
        broken[spoiled, 11] = math.nan
        expected = [-1 if row == spoiled else token for row, token in enumerate(good)]
        assert choose(broken, [state(30, **wish) for wish in wishes]) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("logprobs", 1000),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-3: 1.0}),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
