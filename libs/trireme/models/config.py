"""What a model is.

One frozen record for all supported architectures: differences between them are fields, so a
model's code asks for a feature and never for a name.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Family(enum.Enum):
    """Which decoder reads the weights."""

    LLAMA = "llama"
    """RMS norms, rotary positions, gated feed-forwards: Llama, Mistral, Mixtral, Qwen, Phi-3, Gemma."""
    GPT2 = "gpt2"
    """Pre-norm with bias, learned positions, GELU."""
    ENCODER = "encoder"
    """Post-norm with bias, learned positions, attention in both directions: BERT and its kin."""


class RopeKind(enum.Enum):
    """How rotary frequencies are stretched beyond the trained context."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


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
    """Context before stretching; used by llama3 and longrope."""
    short_factors: tuple[float, ...] = ()
    """Longrope: what each pair's frequency is divided by where no sequence exceeds the original context."""
    long_factors: tuple[float, ...] = ()
    """Longrope: the same where one may."""
    amplitude: float = 1.0
    """Factor on cosines and sines; 1 but for longrope."""


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
class EncoderConfig:
    """What encoders have that decoders have not."""

    padding_id: int | None
    """Positions begin behind it, and a token of this id has none but its own; None: they begin at 0."""
    token_types: int
    """Rows of the embedding of token types, of which the first is added; 0: there is none."""
    labels: tuple[str, ...]
    """Names of the classes that the checkpoint's head tells apart; empty: it has none."""
    is_multi_label: bool = False
    """Each class is likely or not by itself; else they share 1."""


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
    """silu or gelu_new for the Llama family; gelu_new, gelu or relu for GPT-2."""
    tie_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before rotation."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer; None: the whole context."""
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    """Of layers with a window; None: as the others'."""
    rotary_dim: int | None = None
    """Of each head, the first that are rotated; None: all."""
    fused_projections: bool = False
    """Queries, keys and values are stored as one matrix, gate and up as another."""
    norm_adds_one: bool = False
    """RMS norms multiply by 1 plus their weight."""
    post_norms: bool = False
    """What attention and feed-forward give is normalised before it joins the residual stream."""
    embedding_scale: float = 1.0
    """Factor on the embeddings of tokens."""
    score_scale: float | None = None
    """Factor on the dot products of attention; None: 1 / sqrt(head_dim)."""
    attention_cap: float | None = None
    """Scores of attention become cap * tanh(score / cap); None: they stay."""
    logit_cap: float | None = None
    """The same for the logits."""
    scale_by_layer: bool = False
    """GPT-2: divide the scores of layer i by i + 1."""
    scale_by_head_dim: bool = True
    """Divide the scores by sqrt(head_dim)."""
    eos_token_ids: tuple[int, ...] = ()
    mixture: MixtureConfig | None = None
    encoder: EncoderConfig | None = None
    """Of the encoder family."""

    @property
    def context_limit(self) -> int:
        """The longest sequence that can be served: dynamic rope stretches the trained context."""
        if self.rope is not None and self.rope.kind is RopeKind.DYNAMIC:
            return int(self.max_positions * self.rope.factor)
        return self.max_positions
