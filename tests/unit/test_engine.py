"""The engine: what a sequence gets does not depend on who runs beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.engine_support import (
    VOCAB,
    answer,
    greedy,
    outputs_of,
    prompt_of,
    reference_model,
    request,
    run,
    save,
    settings,
    tokens_of,
)
from trireme.engine import (
    Engine,
    EngineSettings,
    FinishReason,
    Mode,
    SamplingParams,
    SequenceRequest,
)
from trireme.engine.sampling import sample
from trireme.errors import (
    ContextLengthExceeded,
    InvalidConfiguration,
    InvalidRequest,
    RequestConflict,
    RequestFailed,
)
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kvcache.block_identity import block_hashes
from trireme.loading.whole import load_model
from trireme.models.model import LayerKv, Model, forward_then_score
from trireme.models.null import NullModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference_model("llama3"), tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory)


@pytest.fixture(scope="module")
def alone(model: Model) -> Callable[[SequenceRequest], list[int]]:
    """The answer of a request that has a roomy engine for itself."""
    known: dict[tuple[Any, ...], list[int]] = {}

    def ask(wanted: SequenceRequest) -> list[int]:
        key: tuple[Any, ...] = (
            tuple(wanted.prompt_token_ids),
            tuple(wanted.delivered_token_ids),
            wanted.sampling.seed,
        )
        key = (*key, wanted.sampling.temperature, wanted.sampling.max_tokens)
        if key not in known:
            engine = Engine(model, settings())
            known[key] = answer(
                engine,
                wanted.prompt_token_ids,
                wanted.sampling,
                delivered_token_ids=wanted.delivered_token_ids,
            )
        return known[key]

    return ask


class Wrapped:
    """A model that can be made to misbehave."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.config = model.config
        self.dtype = model.dtype
        self.device = model.device
        self.max_positions = model.max_positions
        self.key_rotation = model.key_rotation
        self.raises_on: int | None = None
        """A token id that makes the forward raise."""
        self.spoils: int | None = None
        """A token id whose hidden state becomes NaN."""
        self.calls = 0

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        self.calls += 1
        hidden = self.model.forward(tokens, positions, kv, batch)
        if self.raises_on is not None and bool((tokens == self.raises_on).any()):
            raise RuntimeError("this token is not good")
        if self.spoils is not None:
            hidden = hidden.masked_fill((tokens == self.spoils)[:, None], math.nan)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return forward_then_score(self, tokens, positions, kv, batch, scored)


def sampled(seed: int, max_tokens: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, temperature=0.9, top_p=0.95, **changes)


# Random interleavings.


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(6))
def test_answers_in_a_crowded_tiny_pool_equal_those_alone(
    model: Model, alone: Callable[[SequenceRequest], list[int]], policy: str, seed: int
) -> None:
    chance = random.Random(seed)
    engine = Engine(
        model,
        settings(
            num_blocks=20, block_size=4, max_num_seqs=5, max_batch_tokens=16, policy=policy, watermark=0.0
        ),
    )
    shared = prompt_of(seed % 2, 14)
    wanted: dict[str, SequenceRequest] = {}
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    cancelled: set[str] = set()
    for clock in range(2000):
        if len(wanted) < 14 and chance.random() < 0.3:
            name = f"s{len(wanted)}"
            prompt = shared[: chance.randint(0, 14)] + prompt_of(chance.randint(0, 5), chance.randint(1, 20))
            sampling = greedy(25) if chance.random() < 0.5 else sampled(chance.randint(0, 3), 25)
            wanted[name] = request(
                name, prompt, sampling, arrival_s=float(clock), priority=chance.randint(0, 2), salt=b"t"
            )
            engine.add(wanted[name])
        elif wanted and chance.random() < 0.02:
            name = chance.choice(sorted(wanted))
            assert engine.cancel(name) == (name not in ended | cancelled)
            if name not in ended:
                cancelled.add(name)
        result = engine.step()
        assert sum(work.prefill_tokens + work.decode_tokens for work in result.work) <= 16
        for output in result.outputs:
            assert output.sequence_id not in cancelled
            assert output.index == len(tokens.setdefault(output.sequence_id, []))
            assert output.token_id is not None
            tokens[output.sequence_id].append(output.token_id)
            if output.finish_reason is not None:
                ended.add(output.sequence_id)
        if len(wanted) == 14 and not engine.has_work:
            break
    else:
        raise AssertionError("the engine makes no progress")
    for name, got in tokens.items():
        expected = alone(wanted[name])
        assert got == (expected if name in ended else expected[: len(got)])
    assert ended | cancelled == set(wanted)
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0


@given(
    seed=st.integers(0, 3),
    cut=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 0.8]),
    penalty=st.sampled_from([0.0, 1.1]),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_resumed_answer_equals_the_uninterrupted_one(
    model: Model, seed: int, cut: int, temperature: float, penalty: float
) -> None:
    params = SamplingParams(
        seed=seed,
        max_tokens=12,
        temperature=temperature,
        top_k=20,
        frequency_penalty=penalty,
        repetition_penalty=1.0 + penalty / 4,
        min_tokens=3,
        stop_token_ids=tuple(range(0, VOCAB, 9)),
    )
    prompt = prompt_of(seed, 11)
    whole = answer(Engine(model, settings()), prompt, params)
    delivered = tuple(whole[:cut])
    engine = Engine(model, settings())
    engine.add(request("again", prompt, params, delivered_token_ids=delivered))
    outputs = outputs_of(run(engine))["again"]
    rest = [output.token_id for output in outputs if output.token_id is not None]
    assert rest == whole[cut:]
    assert outputs[0].index == len(delivered)
    assert outputs[-1].finish_reason is not None
    assert engine.stats().running == engine.stats().waiting == 0


# Prefix reuse.


def test_choices_of_one_prompt_share_its_blocks_even_when_they_come_together(model: Model) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(3, 40)
    for choice in range(4):
        engine.add(request(f"c{choice}", prompt, sampled(choice)))
    tokens = tokens_of(run(engine))
    stats = engine.stats()
    assert stats.prefix_hit_tokens == 3 * 32
    assert stats.prefill_tokens == 40 + 3 * 8
    assert tokens["c2"] == answer(Engine(model, settings()), prompt, sampled(2))
    assert tokens["c0"] != tokens["c1"]


def test_only_the_last_token_is_computed_when_all_is_found(model: Model) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(4, 33)
    first = answer(engine, prompt, greedy(6))
    engine.add(request("again", prompt, greedy(6)))
    results = run(engine)
    assert tokens_of(results)["again"] == first
    assert outputs_of(results)["again"][0].cached_tokens == 32
    assert results[0].work[0].prefill_tokens == 1
    assert all(output.cached_tokens is None for output in outputs_of(results)["again"][1:])


def test_sequences_of_different_salts_share_nothing(model: Model) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(4, 33)
    answer(engine, prompt, greedy(2), salt=b"one")
    answer(engine, prompt, greedy(2), salt=b"two")
    assert engine.stats().prefix_hit_tokens == 0


def test_a_conversation_finds_its_last_answer_again(model: Model) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(5, 20)
    first = answer(engine, prompt, greedy(20))
    answer(engine, prompt + first + prompt_of(6, 5), greedy(3))
    assert engine.stats().prefix_hit_tokens == 32


def test_without_a_prefix_cache_nothing_is_found_and_answers_are_the_same(model: Model) -> None:
    engine = Engine(model, settings(prefix_cache=False))
    prompt = prompt_of(5, 20)
    assert answer(engine, prompt, greedy(20)) == answer(engine, prompt, greedy(20))
    assert engine.stats().prefix_hit_tokens == 0
    assert engine.stats().kv_blocks_cached == 0


# Lower tiers.


class Shelf:
    """A lower tier that keeps what is evicted."""

    def __init__(self) -> None:
        self.resident: set[bytes] = set()
        self.kept: dict[bytes, bytes] = {}

    def match(self, hashes: Sequence[bytes]) -> int:
        return next((count for count, name in enumerate(hashes) if name not in self.kept), len(hashes))

    def on_cached(self, block_hash: bytes) -> None:
        assert block_hash not in self.resident
        self.resident.add(block_hash)

    def on_evicted(self, block_hash: bytes, export: Callable[[], bytes]) -> None:
        self.resident.remove(block_hash)
        self.kept[block_hash] = export()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_moved_to_another_engine_give_the_same_answer_without_prefill(
    directory: Path, dtype: torch.dtype
) -> None:
    model = load_model(directory, dtype=dtype)
    source, target = Engine(model, settings()), Engine(model, settings())
    assert source.kv_layout == target.kv_layout
    wanted = request("moved", prompt_of(7, 45), greedy(20), salt=b"tenant")
    expected = answer(source, wanted.prompt_token_ids, wanted.sampling, salt=b"tenant")

    missing = target.missing_prefix(wanted)
    assert missing == block_hashes(wanted.prompt_token_ids, 8, b"tenant")[:5]
    for block_hash in missing:
        payload = source.export_block(block_hash)
        assert payload is not None
        assert target.import_block(block_hash, memoryview(payload))
        assert target.export_block(block_hash) == payload
    assert target.missing_prefix(wanted) == ()
    target.add(wanted)
    results = run(target)
    assert tokens_of(results)["moved"] == expected
    assert target.stats().prefill_tokens == 45 - 40
    assert outputs_of(results)["moved"][0].cached_tokens == 40


def test_a_block_of_the_wrong_length_or_without_room_is_a_miss(model: Model) -> None:
    engine = Engine(model, settings(num_blocks=2))
    size = 2 * 2 * 8 * 2 * 8 * 4
    assert not engine.import_block(b"a", b"short")
    assert engine.export_block(b"a") is None
    assert engine.import_block(b"a", bytes(size))
    assert engine.import_block(b"a", bytes(size))
    assert engine.stats().kv_blocks_cached == 1
    engine.add(request("holds all", prompt_of(1, 15), greedy(1)))
    engine.add(request("waits", prompt_of(2, 15), greedy(1)))
    assert engine.import_block(b"b", bytes(size))
    run(engine)


def test_a_tier_hears_of_every_block_and_may_keep_it(model: Model) -> None:
    shelf = Shelf()
    engine = Engine(model, settings(num_blocks=8), shelf)
    wanted = request("first", prompt_of(8, 40), greedy(8), salt=b"s")
    engine.add(wanted)
    expected = tokens_of(run(engine))["first"]
    answer(engine, prompt_of(9, 50), greedy(8))  # pushes the first one out
    missing = engine.missing_prefix(wanted)
    assert shelf.match(missing) == len(missing) > 0
    assert len(shelf.resident) == engine.stats().kv_blocks_cached

    fresh = Engine(model, settings())
    for block_hash in fresh.missing_prefix(wanted):
        payload = shelf.kept.get(block_hash) or engine.export_block(block_hash)
        assert payload is not None
        fresh.import_block(block_hash, payload)
    fresh.add(wanted)
    assert tokens_of(run(fresh))["first"] == expected
    assert fresh.stats().prefix_hit_tokens == 32


# Faults.


def test_a_fault_in_the_forward_ends_its_culprit_alone(
    model: Model, alone: Callable[[SequenceRequest], list[int]]
) -> None:
    wrapped = Wrapped(model)
    wrapped.raises_on = 7
    engine = Engine(wrapped, settings())
    wanted = [request(f"s{n}", [n + 10, *prompt_of(n, 5)], greedy(8)) for n in range(5)]
    bad = request("bad", [1, 2, 7, 4], greedy(8))
    good = [one for one in wanted if 7 not in one.prompt_token_ids and 7 not in alone(one)]
    assert len(good) >= 2
    for one in [*good[:1], bad, *good[1:]]:
        engine.add(one)
    results = run(engine)
    outputs = outputs_of(results)
    assert [output.finish_reason for output in outputs["bad"]] == [FinishReason.ERROR]
    assert isinstance(outputs["bad"][0].error, RequestFailed)
    for one in good:
        assert tokens_of(results)[one.sequence_id] == alone(one)
    assert engine.stats().errors == 1
    assert engine.stats().kv_blocks_used == 0


def test_scores_that_are_not_numbers_end_their_sequence_and_leave_nothing_behind(
    model: Model, alone: Callable[[SequenceRequest], list[int]]
) -> None:
    wrapped = Wrapped(model)
    wrapped.spoils = 7
    engine = Engine(wrapped, settings())
    good = request("good", [1, 2, 3], greedy(6))
    assert 7 not in alone(good)
    bad = request("bad", [*prompt_of(1, 20), 7], greedy(6))
    engine.add(bad)
    engine.add(good)
    results = run(engine)
    assert outputs_of(results)["bad"][-1].finish_reason is FinishReason.ERROR
    assert tokens_of(results)["good"] == alone(good)
    wrapped.spoils = None
    engine.add(bad)
    again = run(engine)
    assert tokens_of(again)["bad"] == alone(bad)
    assert outputs_of(again)["bad"][0].cached_tokens == 0


def test_a_fault_in_sampling_ends_its_culprit_alone(
    model: Model, alone: Callable[[SequenceRequest], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(logits: Tensor, states: Sequence[Any]) -> Any:
        if any(one.params.seed == 666 for one in states):
            raise ZeroDivisionError("an unlucky seed")
        return sample(logits, states)

    monkeypatch.setattr("trireme.engine.token_choice.sample", fragile)
    engine = Engine(model, settings())
    good = request("good", prompt_of(2, 6), sampled(1))
    engine.add(good)
    engine.add(request("bad", prompt_of(3, 6), sampled(666)))
    results = run(engine)
    assert outputs_of(results)["bad"][0].finish_reason is FinishReason.ERROR
    monkeypatch.undo()
    assert tokens_of(results)["good"] == alone(good)


# How answers end.


def test_an_answer_ends_at_an_end_token_unless_told_otherwise(model: Model) -> None:
    prompt = prompt_of(1, 9)
    free = answer(Engine(model, settings(), eos_token_ids=frozenset()), prompt, greedy(30))
    end = free[4]
    first = free.index(end)
    engine = Engine(model, settings(), eos_token_ids=frozenset({end}))
    engine.add(request("stops", prompt, greedy(30)))
    engine.add(request("ignores", prompt, greedy(30, ignore_eos=True)))
    engine.add(request("waits", prompt, greedy(30, min_tokens=30)))
    engine.add(request("stop id", prompt, greedy(30, ignore_eos=True, stop_token_ids=(end,))))
    outputs = outputs_of(run(engine))
    assert [output.token_id for output in outputs["stops"]] == free[: first + 1]
    assert outputs["stops"][-1].finish_reason is FinishReason.STOP
    assert [output.token_id for output in outputs["ignores"]] == free
    assert outputs["ignores"][-1].finish_reason is FinishReason.LENGTH
    assert len(outputs["waits"]) == 30
    assert end not in [output.token_id for output in outputs["waits"]]
    assert [output.token_id for output in outputs["stop id"]] == free[: first + 1]


def test_an_answer_ends_where_the_context_is_full(model: Model) -> None:
    engine = Engine(model, settings(max_model_len=20))
    engine.add(request("fills", prompt_of(1, 15), greedy(100)))
    outputs = outputs_of(run(engine))["fills"]
    assert len(outputs) == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_cancelled_sequence_gives_nothing_more(model: Model) -> None:
    engine = Engine(model, settings())
    engine.add(request("gone", prompt_of(1, 15), greedy(100)))
    engine.add(request("stays", prompt_of(2, 15), greedy(3)))
    engine.step()
    assert engine.cancel("gone")
    assert not engine.cancel("gone")
    assert not engine.cancel("never was")
    assert set(tokens_of(run(engine))) == {"stays"}
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"prompt_token_ids": ()}, InvalidRequest, "prompt_token_ids"),
        ({"prompt_token_ids": (1, VOCAB)}, InvalidRequest, "prompt_token_ids"),
        ({"delivered_token_ids": (-1,)}, InvalidRequest, "delivered_token_ids"),
        ({"prompt_token_ids": (1,) * 64}, ContextLengthExceeded, "prompt_token_ids"),
        ({"mode": Mode.SCORE}, InvalidRequest, "score_continuations"),
        ({"mode": Mode.SCORE, "score_continuations": ((),)}, InvalidRequest, "score_continuations"),
        ({"sampling": SamplingParams(logit_bias={VOCAB: 1.0})}, InvalidRequest, "logit_bias"),
        ({"sampling": SamplingParams(stop_token_ids=(VOCAB,))}, InvalidRequest, "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    model: Model, changes: dict[str, Any], error: type[InvalidRequest], param: str
) -> None:
    engine = Engine(model, settings(max_model_len=64))
    values: dict[str, Any] = {"sequence_id": "x", "prompt_token_ids": (1, 2), **changes}
    with pytest.raises(error) as caught:
        engine.add(SequenceRequest(**values))
    assert caught.value.param == param
    assert not engine.has_work


def test_an_id_is_taken_until_its_sequence_ends(model: Model) -> None:
    engine = Engine(model, settings())
    engine.add(request("x", (1, 2), greedy(2)))
    with pytest.raises(RequestConflict):
        engine.add(request("x", (1, 2), greedy(2)))
    run(engine)
    engine.add(request("x", (1, 2), greedy(2)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 0},
        {"max_batch_tokens": 4},
        {"policy": "random"},
        {"watermark": 1.0},
        {"max_model_len": 1},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfiguration):
        settings(**changes)


def test_a_context_that_does_not_fit_is_refused(model: Model) -> None:
    with pytest.raises(InvalidConfiguration):
        Engine(model, settings(num_blocks=4, max_model_len=33))


# Scores and vectors.


@pytest.mark.parametrize("length", [21, 24])
def test_scores_are_sums_of_log_probabilities(model: Model, length: int) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(1, length)
    continuations = ((5,), (6, 7, 8), tuple(prompt_of(2, 30)), (5, 9))
    engine.add(
        SequenceRequest(
            sequence_id="s", prompt_token_ids=prompt, mode=Mode.SCORE, score_continuations=continuations
        )
    )
    engine.add(request("beside", prompt_of(3, 10), greedy(5)))
    results = run(engine)
    (score,) = [score for result in results for score in result.scores]
    reference = reference_model("llama3")
    for continuation, got in zip(continuations, score.logprobs, strict=True):
        with torch.inference_mode():
            logprobs = reference(torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
        expected = sum(
            logprobs[len(prompt) - 1 + index, token].item() for index, token in enumerate(continuation)
        )
        assert got == pytest.approx(expected, abs=1e-4)
    assert score.sequence_id == "s"
    assert score.cached_tokens == 3 * 16
    assert {work.sequence_id for result in results for work in result.work} == {"s", "beside"}


def test_a_vector_is_the_mean_hidden_state_scaled_to_length_one(model: Model) -> None:
    engine = Engine(model, settings())
    prompt = prompt_of(1, 61)
    answer(engine, prompt, greedy(2))  # its blocks are resident, but hidden states are needed
    engine.add(SequenceRequest(sequence_id="e", prompt_token_ids=prompt, mode=Mode.EMBED))
    (vector,) = [vector for result in run(engine) for vector in result.embeddings]
    with torch.inference_mode():
        hidden = reference_model("llama3").model(torch.tensor([prompt])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).tolist()
    assert vector.vector == pytest.approx(expected, abs=1e-5)


def test_a_fault_in_one_continuation_ends_the_request_once(model: Model) -> None:
    wrapped = Wrapped(model)
    wrapped.raises_on = 7
    engine = Engine(wrapped, settings())
    engine.add(
        SequenceRequest(
            sequence_id="s",
            prompt_token_ids=(1, 2, 3),
            mode=Mode.SCORE,
            score_continuations=((4, 4), (7, 7, 4), (7, 7), (5, 5)),
        )
    )
    results = run(engine)
    outputs = outputs_of(results)
    assert [output.finish_reason for output in outputs["s"]] == [FinishReason.ERROR]
    assert not any(result.scores for result in results)
    assert engine.stats().kv_blocks_used == 0


# Accounting.


def test_a_steps_seconds_are_shared_in_proportion_to_tokens(model: Model) -> None:
    times = iter(float(second * second) for second in range(1000))
    engine = Engine(model, settings(), clock=lambda: next(times))
    engine.add(request("a", prompt_of(1, 9), greedy(5)))
    engine.add(request("b", prompt_of(2, 30), greedy(5)))
    results = run(engine)
    assert results[0].seconds == 1.0
    first = {work.sequence_id: work for work in results[0].work}
    assert (first["a"].prefill_tokens, first["b"].prefill_tokens) == (9, 15)
    assert first["a"].seconds == pytest.approx(9 / 24)
    for result in results:
        assert sum(work.seconds for work in result.work) == pytest.approx(result.seconds)
    stats = engine.stats()
    assert stats.prefill_tokens == 39
    assert stats.decode_tokens == 8
    assert stats.output_tokens == 10
    assert stats.busy_s == pytest.approx(sum(result.seconds for result in results))


def test_preemption_recomputes_little(model: Model) -> None:
    engine = Engine(model, settings(num_blocks=10, block_size=4, watermark=0.0))
    for index in range(2):
        engine.add(request(f"s{index}", prompt_of(index, 8), greedy(25), arrival_s=float(index)))
    results = run(engine)
    stats = engine.stats()
    assert {name for result in results for name, _ in result.preempted} == {"s1"}
    assert stats.preemptions >= 1
    assert 0 < stats.recomputed_tokens < 40
    assert stats.recomputed_tokens == sum(result.recomputed_tokens for result in results)


def test_a_large_sequence_is_not_starved_by_a_stream_of_small_ones(model: Model) -> None:
    engine = Engine(model, settings(num_blocks=12, block_size=8, max_passes=5, watermark=0.0))
    engine.add(request("first", prompt_of(0, 20), greedy(10), arrival_s=0.0))
    engine.step()
    engine.add(request("large", prompt_of(1, 80), greedy(5), arrival_s=1.0))
    done: set[str] = set()
    for index in range(200):
        if index % 2 == 0:
            engine.add(request(f"small{index}", prompt_of(2, 6), greedy(9), arrival_s=2.0 + index))
        done |= {output.sequence_id for output in engine.step().outputs if output.finish_reason}
        if "large" in done:
            break
    assert "large" in done
    assert any(name.startswith("small") for name in done)


def test_the_null_model_counts(model: Model) -> None:
    engine = Engine(NullModel(vocab_size=50), EngineSettings(num_blocks=64, max_num_seqs=16))
    for index in range(16):
        engine.add(request(f"n{index}", (index, 47), greedy(6)))
    tokens = tokens_of(run(engine))
    assert all(got == [48, 49, 0, 1, 2, 3] for got in tokens.values())
    assert len(tokens) == 16
