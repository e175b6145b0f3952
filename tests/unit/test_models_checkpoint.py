"""Checkpoints: every accepted form means the same, everything else is refused by file and name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.engine_support import answer, greedy, prompt_of, reference_model, save, settings
from tests.unit.test_models_parity import all_logits
from trireme.engine import EngineSettings, build
from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.kernels import ops
from trireme.kernels.cpu_library import cpu_library
from trireme.loading.whole import load_model
from trireme.models.checkpoint import Checkpoint
from trireme.models.config import RopeKind
from trireme.models.config_parsing import parse_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
PHI3: dict[str, Any] = {"model_type": "phi3", "max_position_embeddings": 128}
GEMMA: dict[str, Any] = {"model_type": "gemma2"}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference_model("qwen2"), tmp_path_factory.mktemp("saved"), shard_size="20KB")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_old_and_new_forms_of_rope_mean_the_same() -> None:
    new = parse_config(
        {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}}
    )
    old = parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}})
    assert new == old
    assert new.rope is not None
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == (RopeKind.LLAMA3, 5e5, 8.0)
    plain = parse_config({**LLAMA, "rope_theta": 1e6, "rope_scaling": None})
    assert plain == parse_config({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})


def test_defaults_are_those_of_transformers() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 8, 1e-6)
    assert not config.tie_embeddings
    assert parse_config(GPT2).tie_embeddings
    assert parse_config(GPT2).intermediate_size == 128
    assert parse_config({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    assert parse_config({**LLAMA, "eos_token_id": [3, 4]}).eos_token_ids == (3, 4)


def test_windows_follow_each_architectures_switches() -> None:
    mistral, qwen = {**LLAMA, "model_type": "mistral"}, {**LLAMA, "model_type": "qwen2"}
    assert parse_config({**mistral, "sliding_window": 8}).windows == (8, 8, 8)
    assert parse_config({**mistral, "sliding_window": None}).windows == (None, None, None)
    assert parse_config({**qwen, "sliding_window": 8}).windows == (None, None, None)
    on = {**qwen, "use_sliding_window": True, "sliding_window": 8}
    assert parse_config({**on, "max_window_layers": 2}).windows == (None, None, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse_config({**on, "layer_types": types}).windows == (8, None, 8)


def test_gemmas_layers_take_turns_as_published() -> None:
    """The published files of the larger ones leave out what these lines say."""
    gemma2 = parse_config({**LLAMA, "model_type": "gemma2"})
    assert gemma2.windows == (4096, None, 4096)
    assert (gemma2.attention_cap, gemma2.logit_cap, gemma2.head_dim) == (50.0, 30.0, 256)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7, "sliding_window": 8}
    scaled = {**text, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    gemma3 = parse_config({"model_type": "gemma3", "text_config": scaled, "eos_token_id": [1, 106]})
    assert gemma3.windows == (8, 8, 8, 8, 8, None, 8)
    assert gemma3.rope is not None and gemma3.local_rope is not None
    assert (gemma3.rope.kind, gemma3.rope.theta, gemma3.rope.factor) == (RopeKind.LINEAR, 1e6, 8.0)
    assert (gemma3.local_rope.kind, gemma3.local_rope.theta) == (RopeKind.DEFAULT, 1e4)
    assert (gemma3.num_heads, gemma3.num_kv_heads, gemma3.vocab_size) == (8, 4, 262_208)
    assert (gemma3.attention_cap, gemma3.logit_cap, gemma3.eos_token_ids) == (None, None, (1, 106))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({**PHI3, "rope_parameters": {"partial_rotary_factor": 0.4}}, "pairs"),
        (
            {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "pairs",
        ),
        (
            {**PHI3, "rope_scaling": {"type": "su", "short_factor": ["a"], "long_factor": [1.0]}},
            "short_factor",
        ),
        ({**PHI3, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({**GEMMA, "hidden_activation": "relu"}, "hidden_activation"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA, "attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({**GEMMA, "layer_types": [["full_attention"]] * 3}, "layer_types"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_an_unsupported_or_malformed_configuration_is_refused_by_field(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        parse_config({**LLAMA, **changes})


def test_end_tokens_come_from_both_files(copy: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(eos_token_id=3))
    edit(copy / "generation_config.json", lambda config: config.update(eos_token_id=[4, 5]))
    assert Checkpoint(copy).eos_token_ids == {3, 4, 5}


def test_the_fingerprint_follows_weights_and_architecture_but_not_the_place(saved: Path, copy: Path) -> None:
    original = Checkpoint(saved).fingerprint()
    assert Checkpoint(copy).fingerprint() == original
    edit(copy / "config.json", lambda config: config.update(transformers_version="9"))
    assert Checkpoint(copy).fingerprint() == original
    edit(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    changed = Checkpoint(copy).fingerprint()
    assert changed != original
    path = Checkpoint(copy).weight_files[0]
    tensors = load_file(path)
    save_file({name: tensor + 0.001 for name, tensor in tensors.items()}, path)
    assert Checkpoint(copy).fingerprint() not in (original, changed)


def test_a_missing_shard_is_named_with_a_tensor_it_holds(copy: Path) -> None:
    path = Checkpoint(copy).weight_files[1]
    path.unlink()
    with pytest.raises(InvalidCheckpoint, match=path.name):
        load_model(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(copy / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    with pytest.raises(InvalidCheckpoint, match=name):
        load_model(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(intermediate_size=64))
    with pytest.raises(InvalidCheckpoint, match=r"gate_proj.*\(56, 32\).*\(64, 32\)"):
        load_model(copy)


def test_broken_files_are_named(copy: Path) -> None:
    path = Checkpoint(copy).weight_files[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InvalidCheckpoint, match=path.name):
        load_model(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="index"):
        Checkpoint(copy)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidCheckpoint, match="neither"):
        Checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        Checkpoint(copy)
    with pytest.raises(InvalidCheckpoint, match="not a directory"):
        Checkpoint(copy / "nowhere")


def test_a_shard_outside_of_the_directory_is_refused(copy: Path) -> None:
    def escape(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"

    edit(copy / "model.safetensors.index.json", escape)
    with pytest.raises(InvalidCheckpoint, match="outside"):
        Checkpoint(copy)


def test_names_without_the_bodys_prefix_are_read(tmp_path: Path) -> None:
    directory = save(reference_model("gpt2"), tmp_path / "full")
    bare = Path(shutil.copytree(directory, tmp_path / "bare"))
    path = bare / "model.safetensors"
    tensors = load_file(path)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, path)
    prompt = prompt_of(1, 9)
    full = answer(build(directory, settings=settings()), prompt, greedy(8))
    assert answer(build(bare, settings=settings()), prompt, greedy(8)) == full


def test_dynamic_rope_equals_token_by_token_decoding_beyond_the_trained_context(tmp_path: Path) -> None:
    import importlib

    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(1)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    reference = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            rope_parameters=rope,
            initializer_range=0.3,
            eos_token_id=None,
        )
    ).eval()
    directory = save(reference, tmp_path)
    prompt = prompt_of(1, 20, vocab=100)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
        )[0, 20:].tolist()
    engine = build(directory, settings=settings())
    assert engine.max_model_len == 128
    assert answer(engine, prompt, greedy(60)) == expected


def test_positions_beyond_the_context_are_refused(saved: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="513"):
        load_model(saved, max_positions=513)
    with pytest.raises(InvalidConfiguration, match="513"):
        build(saved, settings=EngineSettings(num_blocks=64, max_model_len=513))


def test_half_precision_answers(saved: Path) -> None:
    engine = build(saved, dtype=torch.bfloat16, settings=settings())
    assert engine.kv_layout.endswith(":bfloat16")
    assert len(answer(engine, prompt_of(1, 20), greedy(8))) == 8


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_weights_stored_in_bfloat16_are_computed_with_in_float32(
    name: str, is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(ops, "takes_bf16", lambda device, dtype: False)
    elif cpu_library() is None:
        pytest.skip("the native kernels are not built, or this CPU lacks AVX2")
    directory = save(reference_model(name).bfloat16(), tmp_path)
    reference, token_ids = reference_model(name), prompt_of(3, 60)
    with torch.inference_mode():
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = reference(torch.tensor([token_ids])).logits[0]
    found = all_logits(load_model(directory), token_ids)
    assert (found - expected).abs().max().item() <= 1e-4


def test_a_quantization_that_is_not_described_is_refused_by_field(copy: Path) -> None:
    edit(copy / "config.json", lambda value: value.update(quantization={"format": "fp6_e3m2"}))
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: quantization\.version is None"):
        load_model(copy)


def test_a_step_reads_each_weight_once_and_of_experts_the_chosen_ones(tmp_path: Path) -> None:
    for name, chosen in (("llama3", 1.0), ("gpt2", 1.0), ("mixtral", 0.5)):
        reference = reference_model(name)
        dense, experts = 0, 0
        for key, parameter in reference.named_parameters():
            if "experts" in key:
                experts += parameter.numel()
            elif parameter.dim() == 2 and "embed" not in key and "wpe" not in key and "wte" not in key:
                dense += parameter.numel()
        if reference.config.tie_word_embeddings:
            dense += reference.get_input_embeddings().weight.numel()
        model = load_model(save(reference, tmp_path / name))
        assert model.step_bytes == 4 * (dense + int(chosen * experts)), name
