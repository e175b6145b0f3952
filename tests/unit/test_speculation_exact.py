"""Whoever drafts, and however badly: the tokens are those of plain decoding, and nothing else can be told."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.engine_support import (
    VOCAB,
    answer,
    greedy,
    outputs_of,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from tests.unit.kv_movement_support import ChanceRoster, conserves
from tests.unit.speculation_support import Oracle, speculating
from trireme.engine import (
    Engine,
    FinishReason,
    Mode,
    SamplingParams,
    SequenceRequest,
    TokenOutput,
    Truncation,
)
from trireme.engine.speculation.proposals import Proposal
from trireme.errors import InvalidConfiguration
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kvcache.block_identity import block_hashes
from trireme.models.model import LayerKv, Model, forward_then_score
from trireme.policies.speculation import Mark, SpeculationSettings

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    "greedy, repetition": {"temperature": 0.0, "repetition_penalty": 1.3},
    "greedy, biased": {"temperature": 0.0, "logit_bias": {3: 4.0, 5: -100.0}},
    "greedy, logprobs": {"temperature": 0.0, "logprobs": 3},
    "drawn": {"temperature": 1.0, "seed": 7},
    "drawn, cold": {"temperature": 0.3, "seed": 8},
    "drawn, top_k": {"temperature": 0.9, "top_k": 5, "seed": 9},
    "drawn, top_p": {"temperature": 0.9, "top_p": 0.8, "seed": 10},
    "drawn, min_p": {"temperature": 1.1, "min_p": 0.1, "seed": 11},
    "drawn, penalised": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": 12},
    "drawn, all": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "logit_bias": {7: 1.0},
        "min_tokens": 9,
        "stop_token_ids": (1, 2, 3, 4, 5, 6),
        "logprobs": 2,
        "seed": 13,
    },
    "stops": {"temperature": 0.7, "stop_token_ids": tuple(range(0, VOCAB, 6)), "seed": 14},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def requests_of_all_options(max_tokens: int = 30) -> list[SequenceRequest]:
    return [
        request(name, prompt_of(number, 9 + number), SamplingParams(max_tokens=max_tokens, **options))
        for number, (name, options) in enumerate(OPTIONS.items())
    ]


def known_of(plain: dict[str, list[TokenOutput]], wanted: Sequence[SequenceRequest]) -> dict[str, list[int]]:
    """Prompts and answers."""
    return {
        one.sequence_id: [*one.prompt_token_ids, *(o.token_id or 0 for o in plain[one.sequence_id])]
        for one in wanted
    }


def outputs_from(engine: Engine, wanted: Sequence[SequenceRequest]) -> dict[str, list[TokenOutput]]:
    for one in wanted:
        engine.add(one)
    return outputs_of(run(engine))


def assert_same(got: dict[str, list[TokenOutput]], expected: dict[str, list[TokenOutput]]) -> None:
    assert got.keys() == expected.keys()
    for name, outputs in expected.items():
        assert [(o.index, o.token_id, o.finish_reason) for o in got[name]] == [
            (o.index, o.token_id, o.finish_reason) for o in outputs
        ]
        for one, other in zip(got[name], outputs, strict=True):
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None and other.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [t for t, _ in one.top_logprobs] == [t for t, _ in other.top_logprobs]


@pytest.mark.parametrize("has_branches", [False, True])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_every_option_gives_the_tokens_of_plain_decoding(
    model: Model, wrong: float, has_branches: bool
) -> None:
    wanted = requests_of_all_options()
    plain = outputs_from(Engine(model, settings()), wanted)
    assert {o.finish_reason for outputs in plain.values() for o in outputs} >= {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
    oracle = Oracle(known_of(plain, wanted), random.Random(1), wrong=wrong, has_branches=has_branches)
    branching = {"branches": 4, "fixed_tokens": 11} if has_branches else {}
    engine = speculating(model, oracle, max_batch_tokens=100, speculation=branching)
    assert_same(outputs_from(engine, wanted), plain)
    stats = engine.stats()
    assert stats.drafted_tokens > 100
    if has_branches:
        assert (stats.accepted_tokens > 100) == (wrong < 1.0)
    elif wrong == 0.0:
        # Drafts reach beyond the ends of those that stop; all others are right.
        assert stats.accepted_tokens >= 0.85 * stats.drafted_tokens
        assert all(right == tried for right, tried in oracle.num_right)
    elif wrong == 1.0:
        assert stats.accepted_tokens < 0.05 * stats.drafted_tokens
    assert set(oracle.forgotten) == {one.sequence_id for one in wanted}
    assert stats.output_tokens == sum(map(len, plain.values()))
    assert stats.kv_blocks_used == 0 and conserves(engine._cache.pool)


@pytest.mark.parametrize("matches, has_model", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("fixed, branches", [(None, 1), (1, 1), (4, 1), (9, 3)])
def test_the_drafters_of_the_house_change_no_token(
    model: Model, smaller: Model, matches: bool, has_model: bool, fixed: int | None, branches: int
) -> None:
    wanted = requests_of_all_options()
    plain = outputs_from(Engine(model, settings()), wanted)
    engine = speculating(
        model,
        draft=smaller if has_model else None,
        speculation={"matches": matches, "fixed_tokens": fixed, "branches": branches},
        max_batch_tokens=64,
    )
    assert_same(outputs_from(engine, wanted), plain)
    assert fixed is None or engine.stats().drafted_tokens > 10


def test_a_model_that_drafts_for_itself_is_always_right(model: Model) -> None:
    wanted = [request(f"{n}", prompt_of(n, 30 + 7 * n), greedy(40)) for n in range(4)]
    plain = outputs_from(Engine(model, settings()), wanted)
    engine = speculating(model, draft=model, max_batch_tokens=100)
    assert_same(outputs_from(engine, wanted), plain)
    stats = engine.stats()
    # Only the last draft of an answer may reach further than the answer.
    assert stats.accepted_tokens == stats.drafted_tokens
    assert stats.steps < 40 / 5 + 12


@pytest.mark.parametrize("has_branches", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_rejected_tokens_reach_neither_others_nor_the_prefix_cache(
    model: Model, seed: int, has_branches: bool
) -> None:
    chance = random.Random(seed)
    shared = prompt_of(seed, 20)
    wanted = [
        request(
            f"{n}",
            shared[: chance.randint(0, 20)] + prompt_of(n, chance.randint(1, 9)),
            SamplingParams(max_tokens=chance.choice([3, 20, 35]), temperature=0.7 * (n % 2), seed=n),
            salt=b"tenant",
        )
        for n in range(10)
    ]
    plain: dict[str, list[TokenOutput]] = {}
    for one in wanted:
        plain |= outputs_from(Engine(model, settings(block_size=4)), [one])
    oracle = Oracle(known_of(plain, wanted), chance, wrong=0.3, has_branches=has_branches)
    engine = speculating(
        model,
        oracle,
        block_size=4,
        num_blocks=48,
        host_blocks=chance.choice([0, 40]),
        max_batch_tokens=40,
        speculation={"branches": 4, "fixed_tokens": 9} if has_branches else {},
    )
    roster = ChanceRoster(engine, chance)
    engine._roster = roster  # type: ignore[assignment]
    left = list(wanted)
    results = []
    while left or engine.has_work:
        if left and chance.random() < 0.3:
            engine.add(left.pop())
        results.append(engine.step())
        assert conserves(engine._cache.pool)
        for sequence in roster.everybody.values():
            assert sequence.num_computed <= len(sequence.token_ids)
    assert_same(outputs_of(results), plain)
    assert roster.pauses + roster.swap_outs + roster.evictions > 0
    assert sum(right < tried for right, tried in oracle.num_right) > 10
    checked = 0
    for one in wanted:
        tokens = [*one.prompt_token_ids, *(o.token_id or 0 for o in plain[one.sequence_id])]
        honest = Engine(model, settings(block_size=4))
        answer(honest, tokens[:-1], greedy(1), salt=b"tenant")
        for name in block_hashes(tokens[:-1], 4, b"tenant"):
            resident, computed = engine.export_block(name), honest.export_block(name)
            if resident is not None and computed is not None:
                checked += 1
                torch.testing.assert_close(
                    torch.frombuffer(bytearray(resident), dtype=torch.float32),
                    torch.frombuffer(bytearray(computed), dtype=torch.float32),
                    atol=1e-4,
                    rtol=1e-4,
                )
    assert checked > 10
    engine.close()


@pytest.mark.parametrize("has_branches", [False, True])
def test_an_answer_goes_on_over_cuts_of_the_context(model: Model, has_branches: bool) -> None:
    wanted = request(
        "cut", prompt_of(3, 45), greedy(150), truncation=Truncation(head_tokens=8), salt=b"tenant"
    )
    plain = outputs_from(Engine(model, settings(max_model_len=64)), [wanted])
    assert any(output.dropped_tokens for output in plain["cut"])
    oracle = Oracle(known_of(plain, [wanted]), random.Random(2), wrong=0.1, has_branches=has_branches)
    branching = {"branches": 4, "fixed_tokens": 20} if has_branches else {}
    engine = speculating(model, oracle, max_model_len=64, speculation=branching)
    got = outputs_from(engine, [wanted])
    assert_same(got, plain)
    assert [o.dropped_tokens for o in got["cut"]] == [o.dropped_tokens for o in plain["cut"]]
    assert engine.stats().accepted_tokens > 60


def test_an_answer_ends_where_the_context_is_full(model: Model) -> None:
    wanted = [request(f"{n}", prompt_of(n, 20), greedy(100)) for n in range(3)]
    plain = outputs_from(Engine(model, settings(max_model_len=41)), wanted)
    oracle = Oracle(known_of(plain, wanted), random.Random(2), wrong=0.0)
    got = outputs_from(speculating(model, oracle, max_model_len=41), wanted)
    assert_same(got, plain)
    assert [outputs[-1].finish_reason for outputs in got.values()] == [FinishReason.LENGTH] * 3
    assert {len(outputs) for outputs in got.values()} == {21}


def test_scores_and_vectors_beside_drafts_are_what_they_are_alone(model: Model) -> None:
    others = [
        request("score", prompt_of(5, 12), greedy(1), mode=Mode.SCORE, score_continuations=[[1, 2], [3]]),
        request("embed", prompt_of(6, 12), greedy(1), mode=Mode.EMBED),
    ]
    plain = Engine(model, settings())
    for one in others:
        plain.add(one)
    expected = run(plain)
    wanted = [request(f"{n}", prompt_of(n, 9), greedy(30)) for n in range(2)]
    known = known_of(outputs_from(Engine(model, settings()), wanted), wanted)
    engine = speculating(model, Oracle(known, random.Random(1), wrong=0.2))
    for one in (*wanted, *others):
        engine.add(one)
    results = run(engine)
    for kind, field in (("scores", "logprobs"), ("embeddings", "vector")):
        (want,) = (getattr(item, field) for result in expected for item in getattr(result, kind))
        (got,) = (getattr(item, field) for result in results for item in getattr(result, kind))
        assert got == pytest.approx(want, abs=1e-4)


def test_a_step_stays_within_its_tokens_and_its_time_is_shared_out(model: Model) -> None:
    wanted = [request(f"{n}", prompt_of(n, 9), greedy(30)) for n in range(4)]
    known = known_of(outputs_from(Engine(model, settings()), wanted), wanted)
    engine = speculating(model, Oracle(known, random.Random(1), wrong=0.3), max_batch_tokens=14)
    for one in wanted:
        engine.add(one)
    results = run(engine)
    for result in results:
        computed = sum(work.prefill_tokens + work.decode_tokens for work in result.work)
        assert computed - result.accepted_tokens + result.drafted_tokens <= 14
        assert sum(work.seconds for work in result.work) == pytest.approx(result.seconds)
        assert len(result.outputs) >= result.accepted_tokens
    assert max(result.drafted_tokens for result in results) >= 8
    decoded = sum(work.decode_tokens for result in results for work in result.work)
    # A prompt's last token is prefill; every other token of an answer was decoded once.
    assert decoded == 4 * 30 - 4


class Touchy:
    """A model that fails on a token, or computes values of it that are not numbers."""

    def __init__(self, model: Model, *, token: int, raises: bool) -> None:
        self._model, self._token, self._raises = model, token, raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        hit = tokens == self._token
        if self._raises and bool(hit.any()):
            raise RuntimeError("this token is not good")
        hidden = self._model.forward(tokens, positions, kv, batch)
        for keys, values in kv:
            for cache in (keys, values):
                cache.view(-1, *cache.shape[2:])[batch.slots[hit]] = math.nan
        return hidden.masked_fill(hit[:, None], math.nan)

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return forward_then_score(self, tokens, positions, kv, batch, scored)


class Stubborn:
    """Drafts one token over and over."""

    def __init__(self, token: int) -> None:
        self._token = token

    def propose(self, wants: Any, *, batch: int) -> Any:
        mark = Mark("stubborn", 0, True)
        return [Proposal((self._token,) * w.most, (mark,) * w.most, (0.9,) * w.most) for w in wants]

    def observe(self, sequence_id: str, marks: Any, num_right: int) -> None:
        assert num_right == 0

    def forget(self, sequence_id: str) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("raises", [True, False])
def test_a_draft_that_the_model_cannot_bear_harms_nobody(model: Model, raises: bool) -> None:
    wanted = [request(f"{n}", prompt_of(n, 11 + 5 * n), greedy(25)) for n in range(4)]
    plain = outputs_from(Engine(model, settings()), wanted)
    seen = {token for tokens in known_of(plain, wanted).values() for token in tokens}
    poison = next(token for token in range(VOCAB) if token not in seen)
    engine = speculating(Touchy(model, token=poison, raises=raises), Stubborn(poison), max_batch_tokens=60)
    assert_same(outputs_from(engine, wanted), plain)
    assert engine.stats().errors == 0 and engine.stats().accepted_tokens == 0


def test_a_drafter_that_fails_is_asked_no_more(model: Model) -> None:
    calls = 0

    class Broken(Stubborn):
        def propose(self, wants: Any, *, batch: int) -> Any:
            nonlocal calls
            calls += 1
            raise RuntimeError("no")

    wanted = [request("one", prompt_of(1, 9), greedy(20))]
    plain = outputs_from(Engine(model, settings()), wanted)
    assert_same(outputs_from(speculating(model, Broken(0)), wanted), plain)
    assert calls == 1


def test_a_cancelled_sequence_gives_its_draft_models_blocks_back(model: Model) -> None:
    engine = speculating(model, draft=model, max_batch_tokens=60)
    for n in range(3):
        engine.add(request(f"{n}", prompt_of(n, 20), greedy(60)))
    for _ in range(6):
        engine.step()
    assert engine._speculator is not None
    (drafter,) = engine._speculator._drafters
    pool = drafter.readers.pool  # type: ignore[attr-defined]
    assert pool.num_held > 0
    for n in range(3):
        engine.cancel(f"{n}")
    assert pool.num_held == 0 and engine.stats().kv_blocks_used == 0


def test_a_draft_model_short_of_blocks_drafts_for_fewer(model: Model) -> None:
    wanted = [request(f"{n}", prompt_of(n, 20), greedy(30)) for n in range(6)]
    plain = outputs_from(Engine(model, settings()), wanted)
    engine = speculating(model, draft=model, max_batch_tokens=100)
    assert engine._speculator is not None
    (drafter,) = engine._speculator._drafters
    taken = drafter.readers.pool.allocate(drafter.readers.pool.num_available - 8)  # type: ignore[attr-defined]
    assert taken
    assert_same(outputs_from(engine, wanted), plain)
    assert engine.stats().accepted_tokens > 0


@pytest.mark.parametrize("branches", [1, 3])
def test_drawn_tokens_have_the_targets_distribution(model: Model, branches: int) -> None:
    """Chi-square over the first three tokens, with drafts that are biased towards the likeliest tokens."""
    prompt, count = prompt_of(4, 10), 1500
    options: dict[str, Any] = {"temperature": 1.3, "top_k": 4}
    sizes = {"max_num_seqs": 32, "max_batch_tokens": 200, "num_blocks": 512}
    engine = speculating(model, draft=model, speculation={"branches": branches}, **sizes)
    for seed in range(count):
        engine.add(
            request(f"{seed}", prompt, SamplingParams(max_tokens=3, seed=seed * 7919, **options), salt=b"t")
        )
    tokens = tokens_of(run(engine))
    stats = engine.stats()
    assert stats.accepted_tokens > 300 and stats.drafted_tokens - stats.accepted_tokens > 300
    laws: dict[tuple[int, ...], dict[int, float]] = {}

    def law(prefix: tuple[int, ...]) -> dict[int, float]:
        """The target's own, from its scores in float64."""
        if prefix not in laws:
            scorer = Engine(model, settings())
            ids = list(range(VOCAB))
            scorer.add(
                request(
                    "law",
                    [*prompt, *prefix],
                    greedy(1),
                    mode=Mode.SCORE,
                    score_continuations=[[token] for token in ids],
                )
            )
            (score,) = [score for result in run(scorer) for score in result.scores]
            best = sorted(ids, key=lambda token: -score.logprobs[token])[:4]
            weights = {token: math.exp(score.logprobs[token] / 1.3) for token in best}
            total = sum(weights.values())
            laws[prefix] = {token: weight / total for token, weight in weights.items()}
        return laws[prefix]

    for depth in range(3):
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for drawn in tokens.values():
            by_prefix.setdefault(tuple(drawn[:depth]), []).append(drawn[depth])
        prefix, drawn_tokens = max(by_prefix.items(), key=lambda item: len(item[1]))
        expected = law(prefix)
        assert set(drawn_tokens) <= set(expected)
        observed = [drawn_tokens.count(token) for token in expected]
        wanted = [weight * len(drawn_tokens) for weight in expected.values()]
        chi_square = sum((got - want) ** 2 / want for got, want in zip(observed, wanted, strict=True))
        assert chi_square < 16.27  # exceeded once in a thousand, for three degrees of freedom


def test_settings_refuse_what_makes_no_sense() -> None:
    for changes in (
        *({"fixed_tokens": 0}, {"fixed_tokens": 65}, {"max_tokens": 0}),
        *({"branches": 0}, {"branches": 9}, {"max_tree_tokens": 0}, {"max_tree_tokens": 64}),
    ):
        with pytest.raises(InvalidConfiguration):
            SpeculationSettings(**changes)  # type: ignore[arg-type]
