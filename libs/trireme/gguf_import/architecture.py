"""What a GGUF file's model is: `config.json`, and which of its tensors becomes which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from trireme.errors import InvalidCheckpoint
from trireme.gguf_import.container import GgufFile, StoredTensor
from trireme.gguf_import.metadata import Metadata

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""As GGUF calls them; Mistral's files call themselves llama."""
_CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a tensor becomes."""

    name: str
    """As Hugging Face calls it."""
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    """Its rows are those of so many heads whose pairs are neighbours, not halves; 0: they are as they should
    be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model, and its tensors."""

    config: Mapping[str, Any]
    """For `config.json`, without what the tokenizer knows."""
    placements: Mapping[str, Placement]
    """By the tensor's name in the file."""


def read_architecture(file: GgufFile) -> Architecture:
    """Read the model.

    Raises:
        InvalidCheckpoint: it is of another architecture, has parts that are not served, or a number or a
            tensor is missing, of another shape or one too many.
    """
    metadata = Metadata(file.metadata, str(file.path))
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        raise InvalidCheckpoint(
            f"{file.path}: general.architecture {name!r} cannot be imported; {', '.join(ARCHITECTURES)} can. "
            "Take the checkpoint that the file was made from"
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise InvalidCheckpoint(
            f"{file.path} has experts, which cannot be imported; take the checkpoint that it was made from"
        )
    num_layers = metadata.count(f"{name}.block_count")
    if num_layers > len(file.tensors):
        raise metadata.bad(f"{name}.block_count", f"at most the {len(file.tensors)} tensors of the file")
    hidden_size = metadata.count(f"{name}.embedding_length")
    num_heads = metadata.count(f"{name}.attention.head_count")
    head_dim = metadata.count(f"{name}.attention.key_length", max(1, hidden_size // num_heads))
    if metadata.count(f"{name}.attention.value_length", head_dim) != head_dim:
        raise metadata.bad(f"{name}.attention.value_length", f"that of the keys, {head_dim}")
    if metadata.count(f"{name}.rope.dimension_count", head_dim) != head_dim or head_dim % 2:
        raise metadata.bad(f"{name}.rope.dimension_count", f"the whole head of {head_dim}, and even")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidCheckpoint(f"{file.path} has no matrix token_embd.weight")
    max_positions = metadata.count(f"{name}.context_length")
    config = {
        "architectures": [_CLASSES[name]],
        "model_type": name,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count(f"{name}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count(f"{name}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": _shortest(metadata.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(metadata.number(f"{name}.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, metadata, name, head_dim, max_positions),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    return Architecture(config=config, placements=_placements(file, config))


def _shortest(value: float) -> float:
    """1e-05 for the float32 that is nearest to it."""
    return float(str(np.float32(value)))


def _rope_scaling(
    file: GgufFile, metadata: Metadata, name: str, head_dim: int, max_positions: int
) -> dict[str, Any] | None:
    kind = metadata.text(f"{name}.rope.scaling.type", "none")
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is not None:
        if kind not in ("none", "linear") or metadata.number(f"{name}.rope.scaling.factor", 1.0) != 1.0:
            raise metadata.bad(f"{name}.rope.scaling.type", f"none beside {_ROPE_FACTORS}")
        factors = _factors(file, stored, head_dim)
        # Each pair's frequency divided by a number of its own, which is what longrope can say.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": max_positions,
            "attention_factor": 1.0,
        }
    if kind == "none":
        return None
    if kind != "linear":
        raise metadata.bad(f"{name}.rope.scaling.type", "none or linear")
    factor = metadata.number(f"{name}.rope.scaling.factor")
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _factors(file: GgufFile, stored: StoredTensor, head_dim: int) -> list[float]:
    if stored.form is not GGMLQuantizationType.F32 or stored.shape != (head_dim // 2,):
        raise InvalidCheckpoint(
            f"{file.path}: {_ROPE_FACTORS} is {stored.form.name} of shape {stored.shape}; it must be F32 of "
            f"({head_dim // 2},)"
        )
    factors: NDArray[np.float32] = file.data(stored).view(np.float32).reshape(-1)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise InvalidCheckpoint(f"{file.path}: {_ROPE_FACTORS} must hold positive numbers")
    return [float(factor) for factor in factors]


def _placements(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Placement]:
    wanted = _wanted(config)
    unknown = sorted(file.tensors.keys() - wanted.keys() - {_ROPE_FACTORS})
    if unknown:
        raise InvalidCheckpoint(
            f"{file.path}: tensor {unknown[0]} is no part of a {config['model_type']} that can be imported"
        )
    for name, placement in wanted.items():
        found = file.tensors.get(name)
        if found is None:
            raise InvalidCheckpoint(f"{file.path}: tensor {name} is missing")
        if found.shape != placement.shape:
            raise InvalidCheckpoint(
                f"{file.path}: tensor {name} has shape {found.shape}, but the metadata ask for "
                f"{placement.shape}"
            )
    return wanted


def _wanted(config: Mapping[str, Any]) -> dict[str, Placement]:
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim, vocab = config["head_dim"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    is_interleaved = kind == "llama"
    wanted = {
        "token_embd.weight": Placement(name="model.embed_tokens.weight", shape=(vocab, hidden)),
        "output_norm.weight": Placement(name="model.norm.weight", shape=(hidden,)),
    }
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = Placement(name="lm_head.weight", shape=(vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        parts: dict[str, tuple[str, tuple[int, ...], int]] = {
            "attn_norm": ("input_layernorm", (hidden,), 0),
            "attn_q": ("self_attn.q_proj", (heads * head_dim, hidden), heads),
            "attn_k": ("self_attn.k_proj", (kv_heads * head_dim, hidden), kv_heads),
            "attn_v": ("self_attn.v_proj", (kv_heads * head_dim, hidden), 0),
            "attn_output": ("self_attn.o_proj", (hidden, heads * head_dim), 0),
            "ffn_norm": ("post_attention_layernorm", (hidden,), 0),
            "ffn_gate": ("mlp.gate_proj", (inner, hidden), 0),
            "ffn_up": ("mlp.up_proj", (inner, hidden), 0),
            "ffn_down": ("mlp.down_proj", (hidden, inner), 0),
        }
        if kind == "qwen3":
            parts["attn_q_norm"] = ("self_attn.q_norm", (head_dim,), 0)
            parts["attn_k_norm"] = ("self_attn.k_norm", (head_dim,), 0)
        for part, (name, shape, turned) in parts.items():
            wanted[f"blk.{layer}.{part}.weight"] = Placement(
                name=f"model.layers.{layer}.{name}.weight",
                shape=shape,
                interleaved_heads=turned if is_interleaved else 0,
            )
            if kind == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                wanted[f"blk.{layer}.{part}.bias"] = Placement(
                    name=f"model.layers.{layer}.{name}.bias", shape=shape[:1]
                )
    return wanted
