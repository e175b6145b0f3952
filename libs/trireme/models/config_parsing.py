"""What a model is, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trireme.errors import InvalidCheckpoint
from trireme.models.config import Family, MixtureConfig, ModelConfig, RopeConfig, RopeKind
from trireme.models.config_encoder import ENCODER_TYPES, parse_encoder
from trireme.models.config_fields import Fields, token_ids
from trireme.models.config_gemma import GEMMA_TYPES, parse_gemma
from trireme.models.config_rope import parse_rope, rotary_share
from trireme.models.config_windows import windows_of_types
from trireme.quant.foreign_schemes import KEY, parse_scheme

_LLAMA_FAMILY: Final = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3")


def parse_config(raw: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Read a model's `config.json`, as written by transformers 4 or 5.

    Raises:
        InvalidCheckpoint: the architecture, one of its options or how its weights are quantized is not
            supported, or a field is missing or malformed; names `source` and the field.
    """
    fields = Fields(raw, source)
    model_type = fields.text("model_type")
    if raw.get(KEY) is not None:
        parse_scheme(raw[KEY], source=source)
    if model_type in _LLAMA_FAMILY:
        config = _parse_llama(fields, model_type)
    elif model_type in GEMMA_TYPES:
        config = parse_gemma(fields, model_type)
    elif model_type in ENCODER_TYPES:
        config = parse_encoder(fields, model_type)
    elif model_type == "gpt2":
        config = _parse_gpt2(fields)
    else:
        supported = ", ".join((*_LLAMA_FAMILY, *GEMMA_TYPES, "gpt2", *ENCODER_TYPES))
        raise InvalidCheckpoint(
            f"{source}: model_type {model_type!r} is not supported; use one of {supported}"
        )
    if config.num_heads % config.num_kv_heads:
        raise InvalidCheckpoint(
            f"{source}: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    return config


def _parse_llama(fields: Fields, model_type: str) -> ModelConfig:
    is_qwen3 = model_type in ("qwen3", "qwen3_moe")
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    num_layers = fields.count("num_hidden_layers")
    head_dim = fields.count("head_dim", 128 if is_qwen3 else max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise InvalidCheckpoint(f"{fields.source}: head_dim {head_dim} is odd; rotary positions need pairs")
    attention_bias = (model_type == "llama" or is_qwen3) and fields.flag("attention_bias", False)
    rope, rotary_dim = _parse_rotation(fields, model_type, head_dim)
    return ModelConfig(
        model_type=model_type,
        family=Family.LLAMA,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=fields.count("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-5 if model_type == "phi3" else 1e-6),
        activation=fields.one_of("hidden_act", "silu", ("silu",)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias,
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias", False),
        qk_norm=is_qwen3,
        windows=_windows(fields, model_type, num_layers),
        rope=rope,
        rotary_dim=rotary_dim,
        fused_projections=model_type == "phi3",
        eos_token_ids=token_ids(fields.raw.get("eos_token_id"), source=fields.source),
        mixture=_parse_mixture(fields, model_type, num_layers),
    )


def _parse_rotation(fields: Fields, model_type: str, head_dim: int) -> tuple[RopeConfig, int | None]:
    """How heads are rotated, and how much of them; None: all."""
    rope, share = parse_rope(fields), rotary_share(fields)
    if model_type != "phi3" and share != 1:
        raise InvalidCheckpoint(
            f"{fields.source}: partial_rotary_factor is not supported for model_type {model_type}"
        )
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise InvalidCheckpoint(
            f"{fields.source}: partial_rotary_factor {share} rotates {rotary_dim} of {head_dim} dimensions; "
            "rotary positions need pairs"
        )
    if rope.kind is RopeKind.LONGROPE:
        for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if len(factors) != rotary_dim // 2:
                raise InvalidCheckpoint(
                    f"{fields.source}: {name} has {len(factors)} entries; there are {rotary_dim // 2} pairs"
                )
    return rope, None if rotary_dim == head_dim else rotary_dim


def _parse_mixture(fields: Fields, model_type: str, num_layers: int) -> MixtureConfig | None:
    if model_type not in ("mixtral", "qwen3_moe"):
        return None
    # Older files of Qwen3 call it num_experts.
    num_experts = fields.count("num_local_experts", fields.raw.get("num_experts"))
    num_chosen = fields.count("num_experts_per_tok", 2 if model_type == "mixtral" else 8)
    if num_chosen > num_experts:
        raise InvalidCheckpoint(
            f"{fields.source}: num_experts_per_tok {num_chosen} exceeds the {num_experts} experts"
        )
    if model_type == "mixtral":
        inner, renormalises, layers = fields.count("intermediate_size"), True, (True,) * num_layers
    else:
        inner, renormalises = fields.count("moe_intermediate_size"), fields.flag("norm_topk_prob", False)
        step, dense = fields.count("decoder_sparse_step", 1), fields.raw.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise InvalidCheckpoint(f"{fields.source}: mlp_only_layers is {dense!r}; it must be a list")
        layers = tuple([layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)])
    return MixtureConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=inner,
        renormalises=renormalises,
        layers=layers,
    )


def _parse_gpt2(fields: Fields) -> ModelConfig:
    if fields.flag("add_cross_attention", False):
        raise InvalidCheckpoint(f"{fields.source}: add_cross_attention is not supported")
    hidden_size = fields.count("n_embd")
    num_heads = fields.count("n_head")
    num_layers = fields.count("n_layer")
    if hidden_size % num_heads:
        raise InvalidCheckpoint(
            f"{fields.source}: n_embd {hidden_size} is not a multiple of n_head {num_heads}"
        )
    return ModelConfig(
        model_type="gpt2",
        family=Family.GPT2,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("n_inner", 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=fields.count("n_positions", 1024),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.one_of("activation_function", "gelu_new", ("gelu_new", "gelu", "relu")),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        windows=(None,) * num_layers,
        scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
        scale_by_head_dim=fields.flag("scale_attn_weights", True),
        eos_token_ids=token_ids(fields.raw.get("eos_token_id"), source=fields.source),
    )


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    raw = fields.raw
    if model_type in ("mistral", "mixtral"):
        # An absent key is Mistral 7B v0.1's default, an explicit null switches it off; Mixtral has none.
        absent = 4096 if model_type == "mistral" else None
        window = None if raw.get("sliding_window", absent) is None else fields.count("sliding_window", 4096)
        return (window,) * num_layers
    if model_type == "phi3":
        return (fields.optional_count("sliding_window", None),) * num_layers
    if (
        model_type == "llama"
        or not fields.flag("use_sliding_window", False)
        or raw.get("sliding_window", 4096) is None
    ):
        return (None,) * num_layers
    window = fields.count("sliding_window", 4096)
    if raw.get("layer_types") is None:
        first_windowed = raw.get("max_window_layers", 28)
        if not isinstance(first_windowed, int):
            raise InvalidCheckpoint(
                f"{fields.source}: max_window_layers is {first_windowed!r}; it must be an integer"
            )
        return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    return windows_of_types(fields, num_layers, window)
