"""Gemma, Gemma 2 and the text of Gemma 3, read from a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from trireme.errors import InvalidCheckpoint
from trireme.models.config import Family, ModelConfig
from trireme.models.config_fields import Fields, token_ids
from trireme.models.config_rope import parse_rope
from trireme.models.config_windows import windows_of_types

GEMMA_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
"""What `config.json` may call them; gemma3 is one with images, of which only the text is served."""


def parse_gemma(fields: Fields, model_type: str) -> ModelConfig:
    """Absent fields have the values that the published models leave out.

    Raises:
        InvalidCheckpoint: a field is missing or malformed, or asks for attention in both directions.
    """
    eos = fields.raw.get("eos_token_id")
    if model_type == "gemma3":
        text = fields.raw.get("text_config")
        if not isinstance(text, Mapping):
            raise fields.bad("text_config", "an object")
        fields = Fields(text, f"{fields.source}: text_config")
        eos = fields.raw.get("eos_token_id", 1) if eos is None else eos
    is_first, is_third = model_type == "gemma", model_type in ("gemma3", "gemma3_text")
    if fields.flag("use_bidirectional_attention", False):
        raise InvalidCheckpoint(
            f"{fields.source}: use_bidirectional_attention is not supported for text generation"
        )
    hidden_size = fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers")
    num_heads = fields.count("num_attention_heads", 8 if is_third else None)
    head_dim = fields.count("head_dim", 256)
    if head_dim % 2:
        raise InvalidCheckpoint(f"{fields.source}: head_dim {head_dim} is odd; rotary positions need pairs")
    has_bias = fields.flag("attention_bias", False)
    theta = 1_000_000.0 if is_third else 10000.0
    scalar = head_dim if is_first else fields.number("query_pre_attn_scalar", 256.0)
    return ModelConfig(
        model_type=model_type,
        family=Family.LLAMA,
        vocab_size=fields.count("vocab_size", 262_208 if is_third else None),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", 4 if is_third else num_heads),
        head_dim=head_dim,
        max_positions=fields.count("max_position_embeddings", 131_072 if is_third else 8192),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=_activation(fields),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=has_bias,
        out_bias=has_bias,
        qk_norm=is_third,
        windows=_windows(fields, model_type, num_layers),
        rope=parse_rope(fields, default_theta=theta, layer_type="full_attention"),
        local_rope=parse_rope(fields, layer_type="sliding_attention") if is_third else None,
        norm_adds_one=True,
        post_norms=not is_first,
        embedding_scale=math.sqrt(hidden_size),
        score_scale=1.0 / math.sqrt(scalar),
        attention_cap=_cap(fields, "attn_logit_softcapping", 50.0) if model_type == "gemma2" else None,
        logit_cap=None if is_first else _cap(fields, "final_logit_softcapping", None if is_third else 30.0),
        eos_token_ids=token_ids(eos, source=fields.source),
    )


def _activation(fields: Fields) -> str:
    """Always the tanh approximation: the first files said gelu and meant it."""
    name = fields.raw.get("hidden_activation") or fields.raw.get("hidden_act") or "gelu_pytorch_tanh"
    if name not in ("gelu_pytorch_tanh", "gelu_new", "gelu"):
        raise fields.bad("hidden_activation", "gelu_pytorch_tanh")
    return "gelu_new"


def _cap(fields: Fields, name: str, absent: float | None) -> float | None:
    return fields.optional_number(name, absent)


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    window = None if model_type == "gemma" else fields.optional_count("sliding_window", 4096)
    if window is None:
        return (None,) * num_layers
    if fields.raw.get("layer_types") is not None:
        return windows_of_types(fields, num_layers, window)
    # Every sixth layer of Gemma 3, every second of Gemma 2 sees the whole context.
    period = 2 if model_type == "gemma2" else fields.count("sliding_window_pattern", 6)
    return tuple([window if (layer + 1) % period else None for layer in range(num_layers)])
