"""What a model is, read from a Hugging Face `config.json`.

One frozen record for all supported architectures: differences between them are fields, so a
model's code asks for a feature and never for a name.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trireme.errors import InvalidCheckpoint
from trireme.quant.foreign_schemes import KEY, parse_scheme


class Family(enum.Enum):
    """Which decoder reads the weights."""

    LLAMA = "llama"
    """Pre-norm RMS, rotary positions, SwiGLU: Llama, Mistral, Mixtral, Qwen2, Qwen3."""
    GPT2 = "gpt2"
    """Pre-norm with bias, learned positions, GELU."""


class RopeKind(enum.Enum):
    """How rotary frequencies are stretched beyond the trained context."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding."""

    kind: RopeKind = RopeKind.DEFAULT
    theta: float = 10000.0
    factor: float = 1.0
    """Stretch of the context; 1 for the default kind."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    """Context before stretching; used by llama3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """Feed-forwards of which each token uses a few."""

    num_experts: int
    num_chosen: int
    """Experts of one token."""
    intermediate_size: int
    """Of one expert."""
    renormalises: bool
    """The chosen experts' shares sum to 1."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have one dense feed-forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one checkpoint."""

    model_type: str
    """As Hugging Face names it."""
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Trained context."""
    norm_eps: float
    activation: str
    """silu for the Llama family; gelu_new, gelu or relu for GPT-2."""
    tie_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before rotation."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer; None: the whole context."""
    rope: RopeConfig | None = None
    scale_by_layer: bool = False
    """GPT-2: divide the scores of layer i by i + 1."""
    scale_by_head_dim: bool = True
    """Divide the scores by sqrt(head_dim)."""
    eos_token_ids: tuple[int, ...] = ()
    mixture: MixtureConfig | None = None

    @property
    def context_limit(self) -> int:
        """The longest sequence that can be served: dynamic rope stretches the trained context."""
        if self.rope is not None and self.rope.kind is RopeKind.DYNAMIC:
            return int(self.max_positions * self.rope.factor)
        return self.max_positions


_LLAMA_FAMILY: Final = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def parse_config(raw: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Read a model's `config.json`, as written by transformers 4 or 5.

    Raises:
        InvalidCheckpoint: the architecture, one of its options or how its weights are quantized is not
            supported, or a field is missing or malformed; names `source` and the field.
    """
    fields = _Fields(raw, source)
    model_type = fields.text("model_type")
    if raw.get(KEY) is not None:
        parse_scheme(raw[KEY], source=source)
    if model_type in _LLAMA_FAMILY:
        config = _parse_llama(fields, model_type)
    elif model_type == "gpt2":
        config = _parse_gpt2(fields)
    else:
        supported = ", ".join((*_LLAMA_FAMILY, "gpt2"))
        raise InvalidCheckpoint(
            f"{source}: model_type {model_type!r} is not supported; use one of {supported}"
        )
    if config.num_heads % config.num_kv_heads:
        raise InvalidCheckpoint(
            f"{source}: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    return config


class _Fields:
    """Typed access to the raw mapping; every error names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def _bad(self, name: str, wanted: str) -> InvalidCheckpoint:
        value = self.raw.get(name)
        found = "is missing" if value is None else f"is {value!r}"
        return InvalidCheckpoint(f"{self.source}: {name} {found}; it must be {wanted}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.raw.get(name, default)
        if not isinstance(value, str):
            raise self._bad(name, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, "true or false")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._bad(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._bad(name, "a positive number")
        return float(value)

    def one_of(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise self._bad(name, "one of " + ", ".join(allowed))
        return value


def _parse_llama(fields: _Fields, model_type: str) -> ModelConfig:
    is_qwen3 = model_type in ("qwen3", "qwen3_moe")
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    num_layers = fields.count("num_hidden_layers")
    head_dim = fields.count("head_dim", 128 if is_qwen3 else max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise InvalidCheckpoint(f"{fields.source}: head_dim {head_dim} is odd; rotary positions need pairs")
    attention_bias = (model_type == "llama" or is_qwen3) and fields.flag("attention_bias", False)
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
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.one_of("hidden_act", "silu", ("silu",)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias,
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias", False),
        qk_norm=is_qwen3,
        windows=_windows(fields, model_type, num_layers),
        rope=_parse_rope(fields),
        eos_token_ids=token_ids(fields.raw.get("eos_token_id"), source=fields.source),
        mixture=_parse_mixture(fields, model_type, num_layers),
    )


def _parse_mixture(fields: _Fields, model_type: str, num_layers: int) -> MixtureConfig | None:
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


def _parse_gpt2(fields: _Fields) -> ModelConfig:
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


def _windows(fields: _Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    raw = fields.raw
    if model_type in ("mistral", "mixtral"):
        # An absent key is Mistral 7B v0.1's default, an explicit null switches it off; Mixtral has none.
        absent = 4096 if model_type == "mistral" else None
        window = None if raw.get("sliding_window", absent) is None else fields.count("sliding_window", 4096)
        return (window,) * num_layers
    if (
        model_type == "llama"
        or not fields.flag("use_sliding_window", False)
        or raw.get("sliding_window", 4096) is None
    ):
        return (None,) * num_layers
    window = fields.count("sliding_window", 4096)
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first_windowed = raw.get("max_window_layers", 28)
        if not isinstance(first_windowed, int):
            raise InvalidCheckpoint(
                f"{fields.source}: max_window_layers is {first_windowed!r}; it must be an integer"
            )
        return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not set(layer_types) <= known.keys()
    ):
        raise InvalidCheckpoint(
            f"{fields.source}: layer_types must name full_attention or sliding_attention for each of "
            f"{num_layers} layers"
        )
    return tuple(known[layer_type] for layer_type in layer_types)


def _parse_rope(fields: _Fields) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of older files."""
    raw = fields.raw
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = raw.get(name)
        if part is not None and not isinstance(part, Mapping):
            raise InvalidCheckpoint(f"{fields.source}: {name} is {part!r}; it must be an object")
        merged.update(part or {})
    rope = _Fields({"rope_theta": raw.get("rope_theta"), **merged}, f"{fields.source}: rope_parameters")
    name = merged.get("rope_type") or merged.get("type") or "default"
    try:
        kind = RopeKind(name)
    except ValueError:
        supported = ", ".join(kind.value for kind in RopeKind)
        raise InvalidCheckpoint(
            f"{fields.source}: rope_type {name!r} is not supported; use one of {supported}"
        ) from None
    if merged.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidCheckpoint(f"{fields.source}: partial_rotary_factor is not supported")
    theta = rope.number("rope_theta", 10000.0)
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta=theta)
    factor = rope.number("factor")
    if kind is not RopeKind.LLAMA3:
        return RopeConfig(kind=kind, theta=theta, factor=factor)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.count(
            "original_max_position_embeddings", raw.get("original_max_position_embeddings")
        ),
    )


def token_ids(value: object, *, source: str) -> tuple[int, ...]:
    """`eos_token_id`, which is absent, one id, or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise InvalidCheckpoint(f"{source}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return tuple(ids)
