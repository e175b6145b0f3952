"""Every architecture: logits and greedy tokens equal those of transformers, alone and in a crowd."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.engine_support import (
    ARCHITECTURES,
    SHARDED,
    answer,
    greedy,
    prompt_of,
    reference_model,
    request,
    run,
    save,
    settings,
    tokens_of,
)
from trireme.engine import build
from trireme.kernels.attention_batch import AttentionBatch
from trireme.loading.whole import load_model, load_whole
from trireme.models.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers and its checkpoint."""
    name = request.param
    model = reference_model(name)
    shard_size = "20KB" if name in SHARDED else "1GB"
    directory = save(model, tmp_path_factory.mktemp(name), shard_size=shard_size)
    assert (directory / "model.safetensors").exists() != (name in SHARDED)
    return model, directory


def all_logits(model: Model, token_ids: list[int]) -> torch.Tensor:
    """Logits at every position, computed in one chunk."""
    import numpy as np

    config, length = model.config, len(token_ids)
    blocks = -(-length // 8)
    kv = [
        (
            torch.zeros(blocks, 8, config.num_kv_heads, config.head_dim),
            torch.zeros(blocks, 8, config.num_kv_heads, config.head_dim),
        )
        for _ in range(config.num_layers)
    ]
    batch = AttentionBatch(
        query_lens=[length],
        context_lens=[length],
        block_tables=np.arange(blocks, dtype=np.int64)[None],
        block_size=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with torch.inference_mode():
        hidden = model.forward(torch.tensor(token_ids), torch.arange(length), kv, batch)
        return model.logits(hidden)


def reference_answer(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_logits_equal_those_of_transformers(pair: tuple[Any, Path]) -> None:
    reference, directory = pair
    token_ids = prompt_of(1, 100)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    difference = (all_logits(load_model(directory), token_ids) - expected).abs().max().item()
    assert difference <= 1e-4


@pytest.mark.parametrize(("served", "length"), [(None, 100), (64, 60)])
def test_longrope_turns_by_what_the_longest_served_sequence_asks_for(
    served: int | None, length: int, tmp_path: Path
) -> None:
    reference = reference_model("phi3_longrope")
    directory = save(reference, tmp_path / "phi3")
    token_ids = prompt_of(1, length)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    ours = load_whole(directory, max_positions=served)
    assert (all_logits(ours.model, token_ids) - expected).abs().max().item() <= 1e-4
    assert ours.key.endswith(":long" if served is None else ":short")
    if served is not None:
        engine = build(directory, settings=settings(max_model_len=served))
        assert answer(engine, token_ids[:20], greedy(40)) == reference_answer(reference, token_ids[:20], 40)


def test_of_a_model_with_images_the_text_is_served(tmp_path: Path) -> None:
    hf: Any = importlib.import_module("transformers")
    text = reference_model("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight = {**vision, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    torch.manual_seed(5)
    reference = hf.Gemma3ForConditionalGeneration(config).eval()
    token_ids = prompt_of(1, 60)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    ours = load_model(save(reference, tmp_path))
    assert (all_logits(ours, token_ids) - expected).abs().max().item() <= 1e-4


def test_greedy_tokens_equal_those_of_transformers_alone_and_in_a_crowd(pair: tuple[Any, Path]) -> None:
    reference, directory = pair
    shared = prompt_of(2, 40)
    prompts = {
        "long": shared + prompt_of(3, 15),
        "short": prompt_of(4, 3),
        "sharer": shared + prompt_of(5, 9),
        "twin": shared + prompt_of(3, 15),
        "one": prompt_of(6, 1),
    }
    expected = {name: reference_answer(reference, prompt, 64) for name, prompt in prompts.items()}
    engine = build(directory, settings=settings())
    assert answer(engine, prompts["long"], greedy(64)) == expected["long"]

    for name, prompt in prompts.items():
        engine.add(request(name, prompt, greedy(64)))
    results = run(engine)
    assert tokens_of(results) == expected
    assert any(len(result.work) >= 4 for result in results)
    assert engine.stats().prefix_hit_tokens >= 3 * 40
