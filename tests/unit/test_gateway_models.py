"""The catalog of names: what a fleet file and its checkpoints say, or why they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trireme.errors import InvalidCheckpoint, InvalidConfiguration, InvalidRequest, ModelNotFound
from trireme.gateway.models import load_catalog
from trireme.runtime.fleet import Fleet, Model, Variant

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")


def copy(folder: Path, **config: object) -> Path:
    folder.mkdir()
    for name in FILES:
        shutil.copy(CHECKPOINT / name, folder / name)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def fleet(**variants: Path) -> Fleet:
    return Fleet(models={"m": Model(variants={k: Variant(checkpoint=v) for k, v in variants.items()})})


def test_a_model_promises_what_all_its_variants_keep(tmp_path: Path) -> None:
    small = copy(tmp_path / "small", max_position_embeddings=512, vocab_size=4100)
    catalog = load_catalog(fleet(a=CHECKPOINT, b=small))
    assert [model.name for model in catalog.all()] == ["a", "b", "m"]
    assert [catalog.find(name).context_tokens for name in ("a", "b", "m")] == [2048, 512, 512]
    assert catalog.find("m").vocabulary_size == 4096
    assert catalog.find("m").vocabulary is catalog.find("b").vocabulary
    assert catalog.find("a").eos_token_ids == {0, 4}
    with pytest.raises(ModelNotFound, match="there are 'a', 'b', 'm'"):
        catalog.find("c")


def test_a_variant_may_have_its_models_name() -> None:
    catalog = load_catalog(fleet(m=CHECKPOINT))
    assert [(model.name, model.variant_of) for model in catalog.all()] == [("m", "")]


def test_variants_must_speak_the_same_tokens(tmp_path: Path) -> None:
    other = copy(tmp_path / "other")
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["merges"].pop()
    file.write_text(json.dumps(data))
    with pytest.raises(InvalidConfiguration, match="different tokenizers"):
        load_catalog(fleet(a=CHECKPOINT, b=other))


def test_two_things_of_one_name_are_refused() -> None:
    models = {
        "m": Model(variants={"a": Variant(checkpoint=CHECKPOINT)}),
        "a": Model(variants={"b": Variant(checkpoint=CHECKPOINT)}),
    }
    with pytest.raises(InvalidConfiguration, match="two models"):
        load_catalog(Fleet(models=models))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    folder = copy(tmp_path / "bad")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InvalidCheckpoint, match=name):
        load_catalog(fleet(a=folder))


async def test_a_tokenizer_file_that_truncates_does_not(tmp_path: Path) -> None:
    folder = copy(tmp_path / "short")
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(data))
    model = load_catalog(fleet(a=folder)).find("m")
    long = "def f(): pass\n" * 1000  # Long enough to be tokenised off the event loop.
    ids = await model.tokenize(long)
    assert model.vocabulary.tokenizer.decode(ids) == long
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        await model.tokenize("a\ud800")
