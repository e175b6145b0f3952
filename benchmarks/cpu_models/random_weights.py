"""Llama shapes with random weights, as Hugging Face checkpoints: the same seed, the same bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with a head of its own, context 2,048."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * head_dim
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * layer + (2 * self.vocabulary + 1) * self.hidden


SHAPES = {
    "125m": Shape(hidden=768, layers=12, heads=12, kv_heads=12, inner=2048, vocabulary=26_112),
    "850m": Shape(hidden=2048, layers=16, heads=16, kv_heads=4, inner=5632, vocabulary=32_000),
}


def write_random_checkpoint(shape: Shape, directory: Path, *, seed: int) -> None:
    """Write config.json and model.safetensors, in bfloat16.

    Matrices are normal with deviation 1 / sqrt(inputs), embeddings with 1, norms are 1: activations keep
    their size from layer to layer, as in a trained model.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(outputs: int, inputs: int, deviation: float) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * deviation).bfloat16()

    hidden, inner = shape.hidden, shape.inner
    head_dim = hidden // shape.heads
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": normal(shape.vocabulary, hidden, 1.0),
        "model.norm.weight": norm.clone(),
        "lm_head.weight": normal(shape.vocabulary, hidden, hidden**-0.5),
    }
    matrices = {
        "self_attn.q_proj": (shape.heads * head_dim, hidden),
        "self_attn.k_proj": (shape.kv_heads * head_dim, hidden),
        "self_attn.v_proj": (shape.kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, shape.heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, (outputs, inputs) in matrices.items():
            tensors[f"{at}.{name}.weight"] = normal(outputs, inputs, inputs**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = norm.clone()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
