"""Log-probabilities of a prompt are those of transformers, however its tokens came to be computed."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.unit.engine_support import (
    answer,
    greedy,
    outputs_of,
    prompt_of,
    reference_model,
    request,
    run,
    save,
    settings,
)
from trireme.engine import Engine, FinishReason, Mode, SequenceRequest, TokenOutput, Truncation
from trireme.errors import InvalidRequest
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.policies.speculation import SpeculationSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(reference_model("llama3"), tmp_path_factory.mktemp("model")))


@functools.cache
def expected(prompt: tuple[int, ...]) -> torch.Tensor:
    """(tokens, vocab): what may follow each token."""
    with torch.inference_mode():
        found: torch.Tensor = reference_model("llama3")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return found


def check(output: TokenOutput, prompt: list[int], num_top: int) -> None:
    """The output tells of every token of the prompt but the first."""
    rows = output.prompt_logprobs
    assert rows is not None and len(rows) == len(prompt) - 1
    table = expected(tuple(prompt))
    for position, (value, top) in enumerate(rows):
        assert value == pytest.approx(table[position, prompt[position + 1]].item(), abs=1e-4)
        assert len(top) == num_top
        likeliest = table[position].topk(max(1, num_top)).values.tolist()
        assert [each for _, each in top] == pytest.approx(likeliest[:num_top], abs=1e-4)
        assert all(table[position, token].item() == pytest.approx(each, abs=1e-4) for token, each in top)


@pytest.mark.parametrize("length", [1, 2, 24, 25, 61])  # In one chunk of 24 and in several.
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_a_prompt_is_scored_and_answered_in_one_go(model: Model, length: int, max_tokens: int) -> None:
    engine, prompt = Engine(model, settings()), prompt_of(4, length)
    engine.add(request("beside", prompt_of(5, 40), greedy(6)))
    engine.add(request("scored", prompt, greedy(max_tokens, prompt_logprobs=2)))
    outputs = outputs_of(run(engine))["scored"]
    check(outputs[0], prompt, 2)
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    if max_tokens:
        plain = answer(Engine(model, settings()), prompt, greedy(max_tokens))
        assert [output.token_id for output in outputs] == plain
    else:
        assert [output.token_id for output in outputs] == [None]
    assert engine.stats().kv_blocks_used == 0


def test_cached_positions_are_computed_again_and_are_there_for_others(model: Model) -> None:
    engine, prompt = Engine(model, settings()), prompt_of(6, 40)
    answer(engine, prompt, greedy(2))
    wanted = request("scored", prompt, greedy(0, prompt_logprobs=0))
    assert engine.missing_prefix(wanted) == ()
    engine.add(wanted)
    (scored,) = outputs_of(run(engine))["scored"]
    check(scored, prompt, 0)
    assert scored.cached_tokens == 0
    fresh = prompt_of(7, 40)
    engine.add(request("scored", fresh, greedy(0, prompt_logprobs=0)))
    run(engine)
    engine.add(request("after", fresh, greedy(1)))
    assert outputs_of(run(engine))["after"][0].cached_tokens == 32


@pytest.mark.parametrize("changes", [{}, {"host_blocks": 32, "policy": "mlfq"}])
def test_preempted_and_pressed_for_memory_it_is_told_once_and_right(
    model: Model, changes: dict[str, object]
) -> None:
    engine = Engine(model, settings(num_blocks=14, max_num_seqs=3, **changes))
    prompts = {f"s{number}": prompt_of(10 + number, 34) for number in range(4)}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, greedy(24, prompt_logprobs=1, ignore_eos=True)))
    outputs = outputs_of(run(engine))
    assert engine.stats().preemptions > 0, "nothing was preempted: the test shows nothing"
    for name, prompt in prompts.items():
        check(outputs[name][0], prompt, 1)
        assert [output.prompt_logprobs is None for output in outputs[name][1:]] == [True] * 23


def test_drafts_beside_it_change_nothing(model: Model) -> None:
    wanted = SpeculationSettings(fixed_tokens=4)
    prompts = {f"s{number}": prompt_of(20 + number, 5) * 6 for number in range(3)}
    engine = Engine(model, settings(speculation=wanted))
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, greedy(12 if name != "s1" else 0, prompt_logprobs=1)))
    outputs = outputs_of(run(engine))
    assert engine.stats().drafted_tokens > 0, "nothing was drafted: the test shows nothing"
    for name, prompt in prompts.items():
        check(outputs[name][0], prompt, 1)
        if name != "s1":
            plain = answer(Engine(model, settings()), prompt, greedy(12))
            assert [output.token_id for output in outputs[name]] == plain


def test_a_reassigned_sequence_tells_of_its_prompt_alone(model: Model) -> None:
    prompt = prompt_of(8, 30)
    whole = answer(Engine(model, settings()), prompt, greedy(5))
    engine = Engine(model, settings())
    again = request("again", prompt, greedy(5, prompt_logprobs=1), delivered_token_ids=tuple(whole[:3]))
    engine.add(again)
    outputs = outputs_of(run(engine))["again"]
    assert [output.token_id for output in outputs] == whole[3:]
    check(outputs[0], prompt, 1)


def test_what_cannot_be_scored_is_refused(model: Model) -> None:
    engine = Engine(model, settings())
    with pytest.raises(InvalidRequest, match="max_tokens"):
        greedy(0)
    for wanted in (
        request("cut", prompt_of(1, 9), greedy(1, prompt_logprobs=0), truncation=Truncation(head_tokens=0)),
        SequenceRequest(
            sequence_id="vector",
            prompt_token_ids=(1, 2),
            sampling=greedy(1, prompt_logprobs=0),
            mode=Mode.EMBED,
        ),
    ):
        with pytest.raises(InvalidRequest, match="prompt_logprobs"):
            engine.add(wanted)
    assert not engine.has_work


@pytest.mark.parametrize(
    "length", [20, 30]
)  # The first token would be chosen in the step that fails, or later.
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_a_fault_of_one_prompt_is_its_own(
    model: Model, monkeypatch: pytest.MonkeyPatch, length: int, max_tokens: int
) -> None:
    engine, bad = Engine(model, settings()), prompt_of(2, length)

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        scores = unbroken(hidden)
        return scores * float("nan") if len(hidden) > 1 else scores

    unbroken = model.logits
    monkeypatch.setattr(model, "logits", broken)
    engine.add(request("bad", bad, greedy(max_tokens, prompt_logprobs=1)))
    (failed,) = outputs_of(run(engine))["bad"]
    assert failed.finish_reason is FinishReason.ERROR and failed.token_id is None
    monkeypatch.undo()
    engine.add(request("good", bad, greedy(3, prompt_logprobs=1)))
    check(outputs_of(run(engine))["good"][0], bad, 1)
