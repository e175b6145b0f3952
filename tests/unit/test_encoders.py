"""Encoders: vectors and classes equal those of transformers, whatever shares the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.encoder_support import (
    KINDS,
    LABELS,
    VOCAB,
    expected_logits,
    expected_vector,
    reference_encoder,
    write_pooling,
)
from tests.unit.engine_support import greedy, prompt_of, request, run, save
from trireme.engine import EncoderEngine, FinishReason, Mode, StepResult, build
from trireme.errors import (
    ContextLengthExceeded,
    InvalidCheckpoint,
    InvalidConfiguration,
    InvalidRequest,
    RequestConflict,
)
from trireme.loading.encoders import load_encoder
from trireme.models.checkpoint import Checkpoint
from trireme.models.config_parsing import parse_config
from trireme.models.pooling import PoolingKind, read_pooling

pytestmark = pytest.mark.usefixtures("one_thread")

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def engine_of(directory: Path, **changes: Any) -> EncoderEngine:
    with Checkpoint(directory) as checkpoint:
        loaded = load_encoder(checkpoint)
    sizes = {"max_batch_tokens": 96, "max_num_seqs": 8, **changes}
    return EncoderEngine(loaded.model, loaded.pooling, model_key=loaded.key, **sizes)


def add(engine: EncoderEngine, name: str, prompt: list[int], mode: Mode, **changes: Any) -> None:
    engine.add(request(name, prompt, greedy(1), mode=mode, **changes))


def finish(engine: EncoderEngine) -> list[StepResult]:
    return run(engine)  # type: ignore[arg-type]  # what it asks of an engine both have


def vectors_of(results: list[StepResult]) -> dict[str, torch.Tensor]:
    return {one.sequence_id: torch.tensor(one.vector) for result in results for one in result.embeddings}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_classes_are_those_of_transformers_in_a_crowd(kind: str, tmp_path: Path) -> None:
    reference = reference_encoder(kind)
    engine = engine_of(save(reference, tmp_path))
    lengths = (1, 7, 64, 3, 40, 12, 12, 5, 2, 33)
    prompts = {f"t{number}": prompt_of(number, length, VOCAB) for number, length in enumerate(lengths)}
    for name, prompt in prompts.items():
        add(engine, name, prompt, Mode.EMBED)
        add(engine, f"{name}?", prompt, Mode.SCORE, score_continuations=[[2], [0], [1]])
    results = finish(engine)
    assert max(len(result.work) for result in results) > 1
    assert max(sum(work.prefill_tokens for work in result.work) for result in results) <= 96
    vectors = vectors_of(results)
    scores = {score.sequence_id: score.logprobs for result in results for score in result.scores}
    for name, prompt in prompts.items():
        vector = expected_vector(reference, prompt, "mean", normalises=True)
        assert (vectors[name] - vector).abs().max().item() <= 1e-5
        logprobs = expected_logits(reference, prompt).log_softmax(-1)[[2, 0, 1]]
        assert (torch.tensor(scores[f"{name}?"]) - logprobs).abs().max().item() <= 1e-4
    for result in results:
        assert sum(work.seconds for work in result.work) == pytest.approx(result.seconds)
    stats = engine.stats()
    assert (stats.finished, stats.errors, stats.waiting) == (20, 0, 0)
    assert stats.prefill_tokens == 2 * sum(lengths)


@pytest.mark.parametrize("mode", ["cls", "mean", "max"])
@pytest.mark.parametrize("normalises", [True, False])
def test_vectors_are_made_as_the_checkpoint_says(mode: str, normalises: bool, tmp_path: Path) -> None:
    reference = reference_encoder("bert", classifies=False)
    write_pooling(save(reference, tmp_path), mode, normalises=normalises)
    engine, prompt = engine_of(tmp_path), prompt_of(1, 30, VOCAB)
    add(engine, "text", prompt, Mode.EMBED)
    found = vectors_of(finish(engine))["text"]
    assert (found - expected_vector(reference, prompt, mode, normalises=normalises)).abs().max() <= 1e-4


def test_classes_that_exclude_nothing_have_probabilities_of_their_own(tmp_path: Path) -> None:
    reference = reference_encoder("distilbert", problem_type="multi_label_classification")
    engine, prompt = engine_of(save(reference, tmp_path)), prompt_of(1, 20, VOCAB)
    add(engine, "text", prompt, Mode.SCORE, score_continuations=[[0], [1], [2]])
    [score] = [score for result in finish(engine) for score in result.scores]
    expected = expected_logits(reference, prompt).sigmoid()
    assert (torch.tensor(score.logprobs).exp() - expected).abs().max().item() <= 1e-5


def test_padding_in_a_text_takes_no_position_where_the_architecture_says_so(tmp_path: Path) -> None:
    reference = reference_encoder("roberta")
    engine = engine_of(save(reference, tmp_path))
    prompt = [5, 1, 1, 9, 10, 1, 7]
    add(engine, "text", prompt, Mode.EMBED)
    found = vectors_of(finish(engine))["text"]
    assert (found - expected_vector(reference, prompt, "mean", normalises=True)).abs().max() <= 1e-5


def test_the_names_of_the_oldest_files_are_read(tmp_path: Path) -> None:
    reference, prompt = reference_encoder("bert"), prompt_of(1, 20, VOCAB)
    path = save(reference, tmp_path) / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(path).items():
        new = next((name.replace(*pair) for pair in old.items() if name.endswith(pair[0])), name)
        tensors[new] = tensor
    assert sum(name.endswith("gamma") for name in tensors) == 5
    save_file(tensors, path)
    engine = engine_of(tmp_path)
    add(engine, "text", prompt, Mode.EMBED)
    found = vectors_of(finish(engine))["text"]
    assert (found - expected_vector(reference, prompt, "mean", normalises=True)).abs().max() <= 1e-5


def test_what_an_encoder_cannot_answer_is_refused(tmp_path: Path) -> None:
    engine = engine_of(save(reference_encoder("roberta"), tmp_path / "roberta"))
    plain = engine_of(save(reference_encoder("bert", classifies=False), tmp_path / "bert"))
    with pytest.raises(InvalidRequest, match="does not generate"):
        add(engine, "a", [5], Mode.GENERATE)
    with pytest.raises(ContextLengthExceeded, match="65 tokens, but the context holds 64"):
        add(engine, "a", prompt_of(1, 65, VOCAB), Mode.EMBED)
    for prompt in ([], [VOCAB], [-1]):
        with pytest.raises(InvalidRequest, match="prompt"):
            add(engine, "a", prompt, Mode.EMBED)
    for classes in ([], [[len(LABELS)]], [[0, 1]], [[]]):
        with pytest.raises(InvalidRequest, match="class"):
            add(engine, "a", [5], Mode.SCORE, score_continuations=classes)
    with pytest.raises(InvalidRequest, match="no head"):
        add(plain, "a", [5], Mode.SCORE, score_continuations=[[0]])
    add(engine, "a", [5], Mode.EMBED)
    with pytest.raises(RequestConflict):
        add(engine, "a", [5], Mode.EMBED)
    assert engine.cancel("a") and not engine.cancel("a")
    assert not engine.has_work


def test_a_text_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    engine = engine_of(save(reference_encoder("bert"), tmp_path))
    with torch.inference_mode():
        engine.model._embedding[7] = float("nan")
    for name, prompt in (("good", [4, 5, 6]), ("bad", [4, 7]), ("also good", [8])):
        add(engine, name, prompt, Mode.EMBED)
    [result] = finish(engine)
    assert [one.sequence_id for one in result.embeddings] == ["good", "also good"]
    [failed] = result.outputs
    assert (failed.sequence_id, failed.finish_reason) == ("bad", FinishReason.ERROR)
    assert failed.error is not None
    assert engine.stats().errors == 1


def test_an_encoder_is_no_model_to_generate_with_and_is_not_served_in_few_bits(tmp_path: Path) -> None:
    directory = save(reference_encoder("bert"), tmp_path)
    with pytest.raises(InvalidCheckpoint, match="does not generate"):
        build(directory)
    with Checkpoint(directory) as checkpoint, pytest.raises(InvalidConfiguration, match="int8"):
        load_encoder(checkpoint, precision="int8")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"model_type": "roberta", "pad_token_id": -1}, "pad_token_id"),
        ({"model_type": "roberta", "max_position_embeddings": 2}, "max_position_embeddings"),
        ({"architectures": "BertModel"}, "architectures"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"1": "a"}}, "id2label"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "a"}}, "id2label"),
    ],
)
def test_a_malformed_configuration_is_refused_by_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        parse_config({**BERT, **changes})


def test_classes_have_the_names_of_the_configuration() -> None:
    head = {"architectures": ["BertForSequenceClassification"]}
    for changes, labels in (
        ({}, ()),
        (head, ("LABEL_0", "LABEL_1")),
        ({**head, "id2label": {"1": "b", "0": "a", "2": "c"}}, ("a", "b", "c")),
    ):
        encoder = parse_config({**BERT, **changes}).encoder
        assert encoder is not None
        assert encoder.labels == labels


def test_steps_that_are_not_served_are_refused_by_name(tmp_path: Path) -> None:
    assert read_pooling(tmp_path).kind is PoolingKind.MEAN
    path = tmp_path / "modules.json"
    for modules, named in (
        ("{}", "list"),
        ("[", "JSON"),
        ('[{"type": "x.Dense", "path": "2_Dense"}]', "Dense"),
        ('[{"type": "x.Transformer", "path": "0_Transformer"}]', "0_Transformer"),
        ('[{"type": "x.Pooling", "path": "../../etc"}]', "outside"),
        ('[{"type": "x.Pooling", "path": "1_Pooling"}]', "missing"),
    ):
        path.write_text(modules)
        with pytest.raises(InvalidCheckpoint, match=named):
            read_pooling(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    for fields in ({}, {"pooling_mode_lasttoken": True}, {"pooling_mode": "lasttoken"}):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(fields))
        with pytest.raises(InvalidCheckpoint, match="mode"):
            read_pooling(tmp_path)
