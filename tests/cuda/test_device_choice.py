"""Whatever a request wishes: tokens chosen on the device, here the emulator, are those chosen by PyTorch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.engine_support import VOCAB, outputs_of, prompt_of, reference_model, request, run, save
from tests.unit.engine_support import settings as sizes
from tests.unit.speculation_support import Oracle
from trireme.constraints.constraint import Constraint, ConstraintKind
from trireme.constraints.guide import guides_of
from trireme.engine import Engine, FinishReason, SamplingParams, SequenceRequest, TokenOutput, device_choice
from trireme.engine.device_choice import DeviceChooser, chooser_of
from trireme.engine.sampling import SamplingState
from trireme.engine.seen_tokens import SeenTokens
from trireme.engine.speculation.token_tree import TokenTree
from trireme.engine.token_choice import Choices, TorchChooser
from trireme.errors import RequestFailed
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_sampling import (
    BIAS_LOGITS,
    FORBID_LOGITS,
    PENALISE_LOGITS,
    SAMPLE,
    VERIFY_DRAFTS,
)
from trireme.kernels.cuda_transfers import Download, download, upload
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.policies.speculation import SpeculationSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    emulator.prepare([SAMPLE, VERIFY_DRAFTS, BIAS_LOGITS, FORBID_LOGITS, PENALISE_LOGITS])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(reference_model("llama3"), Path(tmp_path_factory.mktemp("llama3"))))


def on_device(emulator: Emulator, *, vocab: int = VOCAB, most: int = 8) -> DeviceChooser:
    return DeviceChooser(emulator, CPU, vocab_size=vocab, most_sequences=most)


WISHES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([1, 3, 40, 10_000]),
        "top_p": st.sampled_from([0.05, 0.71, 0.973]),
        "min_p": st.sampled_from([0.013, 0.29, 1.0]),
        "presence_penalty": st.sampled_from([-1.1, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 1.3]),
        "repetition_penalty": st.sampled_from([0.6, 1.7]),
        "logit_bias": st.dictionaries(st.integers(0, 39), st.sampled_from([-100.0, -1.5, 3.0]), max_size=4),
        "min_tokens": st.sampled_from([2, 50]),
        "logprobs": st.sampled_from([0, 1, 5]),
        "seed": st.integers(0, 2**64 - 1),
    },
)
ROWS = st.lists(st.tuples(WISHES, st.integers(0, 3)), min_size=1, max_size=5)


def state(vocab: int, wishes: dict[str, Any]) -> SamplingState:
    return SamplingState(
        SamplingParams(max_tokens=100, **wishes),
        stop_ids=(0, 3, 5, 10**6),
        prompt_ids=(1, 2, 2, 7),
        output_ids=(4, 4, 8),
        vocab_size=vocab,
        device=CPU,
    )


@given(rows=ROWS, vocab=st.sampled_from([40, 257]), seed=st.integers(0, 10**6), spoils=st.booleans())
@settings(max_examples=16, deadline=None, derandomize=True)
def test_every_wish_gives_the_same_tokens_step_by_step(
    emulator: Emulator, rows: list[tuple[dict[str, Any], int]], vocab: int, seed: int, spoils: bool
) -> None:
    chance = torch.Generator().manual_seed(seed)
    device, host = on_device(emulator, vocab=vocab), TorchChooser()
    ours, theirs = ([state(vocab, wishes) for wishes, _ in rows] for _ in range(2))
    for step in range(3):
        # Few tokens are likely, so that some drafts are right.
        drafts = [draft(count if step else 0, chance) for _, count in rows]
        drafted = drafts if any(drafts) else ()
        logits = torch.randn(sum(1 + len(tree) for tree in drafts), vocab, generator=chance) * 3
        logits[:, :3] += 6
        if spoils:
            spoil(logits, step)
        before = logits.clone()
        choices = device.begin(logits, ours, drafted).wait()
        assert_same(choices, host.begin(logits, theirs, drafted).wait())
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        row = 0
        for one, other, tree in zip(ours, theirs, drafts, strict=True):
            token = max(0, choices.sampled[row].token_id)
            one.observe(token)
            other.observe(token)
            row += 1 + len(tree)


def draft(count: int, chance: torch.Generator) -> TokenTree:
    """So many tokens, in a row or with branches."""
    tokens = tuple(torch.randint(0, 3, (count,), generator=chance).tolist())
    if torch.rand((), generator=chance) < 0.5:
        return TokenTree(tokens)
    parents = [int(torch.randint(-1, place, (), generator=chance)) if place else -1 for place in range(count)]
    return TokenTree(tokens, tuple(parents))


def spoil(logits: Tensor, step: int) -> None:
    """Scores that are no numbers, each kind in a row of its own."""
    logits[-1, 11 * step], logits[0, 3] = torch.nan, torch.inf
    if len(logits) > 2:
        logits[1] = -torch.inf
        logits[2, 4:] = -torch.inf


def assert_same(got: Choices, expected: Choices) -> None:
    assert [one.token_id for one in got.sampled] == [one.token_id for one in expected.sampled]
    assert list(map(tuple, got.paths)) == list(map(tuple, expected.paths))
    for one, other in zip(got.sampled, expected.sampled, strict=True):
        assert one.logprob == other.logprob and one.top_logprobs == other.top_logprobs


# Whole engines.

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    "greedy, logprobs": {"temperature": 0.0, "logprobs": 3},
    "drawn": {"seed": 7},
    "drawn, filtered": {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "seed": 9},
    "drawn, penalised": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": 12},
    "drawn, all": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {7: 1.0, 2: -50.0},
        "min_tokens": 9,
        "stop_token_ids": (1, 2, 3, 4, 5, 6),
        "logprobs": 2,
        "seed": 13,
    },
    "stops": {"temperature": 0.7, "stop_token_ids": tuple(range(0, VOCAB, 6)), "seed": 14},
}


def requests_of_all_options() -> list[SequenceRequest]:
    return [
        request(name, prompt_of(number, 9 + number), SamplingParams(max_tokens=14, **options))
        for number, (name, options) in enumerate(OPTIONS.items())
    ]


def outputs_from(engine: Engine, wanted: Sequence[SequenceRequest]) -> dict[str, list[TokenOutput]]:
    for one in wanted:
        engine.add(one)
    return outputs_of(run(engine))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_blocks": 14, "host_blocks": 8, "policy": "mlfq", "max_num_seqs": 3},
    ],
    ids=["room for all", "preempted"],
)
def test_an_engine_gives_the_same_outputs(model: Model, emulator: Emulator, changes: dict[str, Any]) -> None:
    wanted = requests_of_all_options()
    plain = outputs_from(Engine(model, sizes()), wanted)
    assert {o.finish_reason for outputs in plain.values() for o in outputs} >= {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
    engine = Engine(model, sizes(**changes), chooser=on_device(emulator, most=2))
    got = outputs_from(engine, wanted)
    assert got.keys() == plain.keys()
    for name, outputs in plain.items():
        assert [(o.index, o.token_id, o.finish_reason, o.error) for o in got[name]] == [
            (o.index, o.token_id, o.finish_reason, o.error) for o in outputs
        ]
        for one, other in zip(got[name], outputs, strict=True):
            # Batches of other sizes are rounded otherwise.
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert dict(one.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=1e-4)
    assert bool(engine.stats().preemptions) == bool(changes)


@pytest.mark.parametrize("has_branches", [False, True])
def test_drafts_are_confirmed_on_the_device(model: Model, emulator: Emulator, has_branches: bool) -> None:
    wanted = requests_of_all_options()
    plain = outputs_from(Engine(model, sizes()), wanted)
    known = {
        one.sequence_id: [*one.prompt_token_ids, *(o.token_id or 0 for o in plain[one.sequence_id])]
        for one in wanted
    }
    branching: dict[str, Any] = {"branches": 4, "fixed_tokens": 11} if has_branches else {"fixed_tokens": 5}
    engine = Engine(
        model,
        sizes(speculation=SpeculationSettings(matches=False, **branching), max_batch_tokens=100),
        drafters=[Oracle(known, random.Random(1), wrong=0.3, has_branches=has_branches)],
        chooser=on_device(emulator),
    )
    got = outputs_from(engine, wanted)
    assert {name: [o.token_id for o in outputs] for name, outputs in got.items()} == {
        name: [o.token_id for o in outputs] for name, outputs in plain.items()
    }
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens


def test_a_draft_that_the_kernel_does_not_take_is_compared_on_the_host(emulator: Emulator) -> None:
    long = TokenTree((1,) * 64)
    logits = torch.zeros(65, 40)
    logits[:50, 1], logits[50:, 2] = 9.0, 9.0
    one = state(40, {"temperature": 0.0})
    choices = on_device(emulator, vocab=40).begin(logits, [one], [long]).wait()
    assert choices.paths == [tuple(range(50))]
    assert_same(choices, TorchChooser().begin(logits, [one], [long]).wait())


def test_constraints_hold(tmp_path: Path, emulator: Emulator) -> None:
    checkpoint = constrained_checkpoint(tmp_path)
    model = load_model(checkpoint)
    wishes: list[dict[str, Any]] = [
        {"constraint": Constraint(ConstraintKind.REGEX, "[a-c]{3,9}[0-9]{2}"), "seed": 3},
        {"constraint": Constraint(ConstraintKind.REGEX, "x{40}"), "temperature": 0.0, "min_tokens": 5},
        {"seed": 4, "top_p": 0.9, "repetition_penalty": 1.3},
    ]
    wanted = [
        request(f"{number}", [5, 9, 40 + number], SamplingParams(max_tokens=12, **wish))
        for number, wish in enumerate(wishes)
    ]

    def engine(**changes: Any) -> Engine:
        guides = guides_of(checkpoint, vocab_size=model.config.vocab_size, eos_token_ids=(0,))
        return Engine(model, sizes(), eos_token_ids=frozenset({0}), guides=guides, **changes)

    plain = outputs_from(engine(), wanted)
    assert all(outputs[-1].error is None for outputs in plain.values())
    assert outputs_from(engine(chooser=on_device(emulator, vocab=model.config.vocab_size)), wanted) == plain


# Faults.


def test_a_fault_ends_its_culprit_alone(
    model: Model, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests_of_all_options()
    plain = outputs_from(Engine(model, sizes()), wanted)
    wishes = device_choice._wishes

    def fragile(rows: Sequence[SamplingState], vocab_size: int) -> Any:
        if any(row.params.seed == 12 for row in rows):
            raise RequestFailed("an unlucky seed")
        return wishes(rows, vocab_size)

    monkeypatch.setattr(device_choice, "_wishes", fragile)
    got = outputs_from(Engine(model, sizes(), chooser=on_device(emulator)), wanted)
    assert got.pop("drawn, penalised")[-1].finish_reason is FinishReason.ERROR
    del plain["drawn, penalised"]
    assert got == plain


def test_a_step_has_one_copy_to_the_device_and_one_wait(
    model: Model, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Watched:
        def __init__(self, inner: Download) -> None:
            self._inner = inner

        def wait(self) -> list[Tensor]:
            told.append("wait")
            return self._inner.wait()

    def watched_upload(arrays: Any, device: torch.device) -> dict[str, Tensor]:
        told.append("upload")
        return upload(arrays, device)

    monkeypatch.setattr(device_choice, "upload", watched_upload)
    monkeypatch.setattr(device_choice, "download", lambda tensors: Watched(download(tensors)))
    engine = Engine(model, sizes(), chooser=on_device(emulator))
    for one in requests_of_all_options():
        engine.add(one)
    while engine.has_work:
        told.clear()
        if engine.step().outputs:
            assert told == ["upload", "wait"]


def test_without_kernels_for_the_device_pytorch_chooses() -> None:
    assert isinstance(chooser_of(CPU, vocab_size=100, most_sequences=4), TorchChooser)


# The table of seen tokens.


@given(chance=st.randoms(use_true_random=False), most=st.integers(1, 5))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_rows_of_seen_tokens_hold_what_was_seen_however_often_they_change_hands(
    emulator: Emulator, chance: random.Random, most: int
) -> None:
    vocab = 30
    table = SeenTokens(emulator, CPU, vocab_size=vocab, most=most)
    states = [state(vocab, {"presence_penalty": 1.0}) for _ in range(9)]
    for _ in range(8):
        for one in states:
            for _ in range(chance.randint(0, 2)):
                one.observe(chance.randrange(vocab))
        if chance.random() < 0.2:
            table.clear()
        if chance.random() < 0.3:
            table.forget(chance.choice(states))
        step = chance.sample(states, chance.randint(1, most))
        rows, told = table.plan(step)
        table.tell(upload(told, CPU))
        assert len(set(rows)) == len(step)
        for row, one in zip(rows, step, strict=True):
            counts = Counter(one.output_ids)
            assert table.counts[row].tolist() == [counts[token] for token in range(vocab)]
            assert table.in_prompt[row].tolist() == [token in one.prompt_ids for token in range(vocab)]
    assert len(table.counts) <= 8


def constrained_checkpoint(folder: Path) -> Path:
    """A random model whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return save(transformers.LlamaForCausalLM(config).eval(), folder)
