"""Which of an architecture's weights are matrices of linear layers."""

from __future__ import annotations

from typing import Final

LINEAR_KINDS: Final = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"),
    )
)
"""What is quantized of the Llama family and of its mixtures of experts; a router's gate is not among them.
Phi-3 stores qkv_proj and gate_up_proj as one matrix each."""
GPT2_LINEAR_KINDS: Final = frozenset(("c_attn", "c_proj", "c_fc"))
"""GPT-2 stores these as (input, output)."""
OPTIONAL_KINDS: Final = frozenset(("embed_tokens", "lm_head", "wte"))
"""Embedding and head: quantized only on demand."""


def weight_kind(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`; empty for what is no weight."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def linear_kinds(model_type: object) -> frozenset[str]:
    """The kinds of linear layers of an architecture, as its `config.json` names it."""
    return GPT2_LINEAR_KINDS if model_type == "gpt2" else LINEAR_KINDS


def is_stored_transposed(kind: str, model_type: object) -> bool:
    """Whether weights of a kind are stored as (input, output)."""
    return model_type == "gpt2" and kind in GPT2_LINEAR_KINDS
