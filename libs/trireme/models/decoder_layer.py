"""One layer of a decoder: its weights, read from a checkpoint, and as the CPU's library takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trireme.kernels import ops
from trireme.kernels.decoder_cpu import DenseWeights, ExpertWeights, LayerWeights
from trireme.kernels.low_bit_cpu import PackedLinear
from trireme.kernels.ops import LinearWeight
from trireme.models.config import ModelConfig
from trireme.models.feed_forward import DenseFeedForward, FeedForward, MixtureFeedForward, read_feed_forward
from trireme.models.rope import partial_rotary_order
from trireme.models.weights import ModelWeights, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer's weights, those of one input fused."""

    input_norm: Tensor
    qkv: LinearWeight
    """((heads + 2 * kv_heads) * head_dim, hidden): queries, keys, values."""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """(heads + kv_heads, head_dim)."""
    out: LinearWeight
    out_bias: Tensor | None
    post_attention_norm: Tensor | None
    """(hidden,): of what attention gives, before it joins the residual stream; None: it stays."""
    mlp_norm: Tensor
    post_mlp_norm: Tensor | None
    """The same for the feed-forward."""
    feed_forward: FeedForward
    window: int | None

    @property
    def step_bytes(self) -> int:
        """Bytes of linear weights that one token reads."""
        return ops.weight_bytes(self.qkv) + ops.weight_bytes(self.out) + self.feed_forward.step_bytes


def read_layer(weights: ModelWeights, prefix: str, index: int) -> DecoderLayer:
    """Layer `index`, whose weights' names begin with `prefix`.

    Raises:
        InvalidCheckpoint: a tensor is missing or has another shape.
    """
    config = weights.config
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    at = f"{prefix}layers.{index}."

    def matrix(parts: Sequence[Part], inputs: int, row_order: Tensor | None = None) -> LinearWeight:
        named = [(f"{at}{name}.weight", rows) for name, rows in parts]
        return weights.linear(named, inputs, row_order=row_order)

    def bias(parts: Sequence[Part], wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.cat([weights.tensor(f"{at}{name}.bias", (rows,)) for name, rows in parts])

    def norm(name: str, width: int = hidden) -> Tensor:
        return weights.norm(f"{at}{name}.weight", width)

    qkv: tuple[Part, ...] = (("self_attn.qkv_proj", q_rows + 2 * kv_rows),)
    if not config.fused_projections:
        qkv = (("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows))
    out = (("self_attn.o_proj", hidden),)
    qk_norm = None
    if config.qk_norm:
        q_norm, k_norm = norm("self_attn.q_norm", head_dim), norm("self_attn.k_norm", head_dim)
        qk_norm = torch.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return DecoderLayer(
        input_norm=norm("input_layernorm"),
        qkv=matrix(qkv, hidden, _rotary_order(config)),
        qkv_bias=bias(qkv, config.qkv_bias),
        qk_norm=qk_norm,
        out=matrix(out, q_rows),
        out_bias=bias(out, config.out_bias),
        post_attention_norm=norm("post_attention_layernorm") if config.post_norms else None,
        mlp_norm=norm(before_mlp),
        post_mlp_norm=norm("post_feedforward_layernorm") if config.post_norms else None,
        feed_forward=read_feed_forward(weights, at, index),
        window=config.windows[index],
    )


def _rotary_order(config: ModelConfig) -> Tensor | None:
    """Where each row of queries, keys and values comes from; None: they stay."""
    if config.rotary_dim is None:
        return None
    head_dim, rotated = config.head_dim, config.num_heads + config.num_kv_heads
    order = torch.arange((rotated + config.num_kv_heads) * head_dim).view(-1, head_dim)
    order[:rotated] = order[:rotated, partial_rotary_order(head_dim, config.rotary_dim)]
    return order.view(-1)


def native_layer(layer: DecoderLayer, rotation: tuple[Tensor, Tensor]) -> LayerWeights | None:
    """The layer for `kernels.decoder_cpu`; None: not all of its products are packed for it, or it is a
    mixture with a norm behind.

    Args:
        rotation: cosines and signed sines of its positions.
    """
    if not (isinstance(layer.qkv, PackedLinear) and isinstance(layer.out, PackedLinear)):
        return None
    feed_forward = layer.feed_forward
    native: DenseWeights | ExpertWeights | None
    if isinstance(feed_forward, DenseFeedForward):
        native = _native_dense(feed_forward)
    else:
        native = _native_experts(feed_forward) if layer.post_mlp_norm is None else None
    if native is None:
        return None
    cosines, sines = rotation
    return LayerWeights(
        qkv=layer.qkv,
        out=layer.out,
        feed_forward=native,
        input_norm=layer.input_norm,
        mlp_norm=layer.mlp_norm,
        qk_norm=layer.qk_norm,
        post_attention_norm=layer.post_attention_norm,
        post_mlp_norm=layer.post_mlp_norm,
        qkv_bias=layer.qkv_bias,
        out_bias=layer.out_bias,
        cosines=cosines,
        sines=sines,
        window=layer.window,
    )


def _native_dense(dense: DenseFeedForward) -> DenseWeights | None:
    if not (isinstance(dense.gate_up, PackedLinear) and isinstance(dense.down, PackedLinear)):
        return None
    return DenseWeights(
        gate_up=dense.gate_up,
        gate_up_bias=dense.gate_up_bias,
        down=dense.down,
        down_bias=dense.down_bias,
    )


def _native_experts(mixture: MixtureFeedForward) -> ExpertWeights | None:
    if not (isinstance(mixture.gate_up, tuple) and isinstance(mixture.down, tuple)):
        return None
    gate_up = tuple([weight for weight in mixture.gate_up if isinstance(weight, PackedLinear)])
    down = tuple([weight for weight in mixture.down if isinstance(weight, PackedLinear)])
    if len(gate_up) + len(down) < 2 * len(mixture.gate_up):
        return None
    return ExpertWeights(
        router=mixture.router.contiguous(),
        gate_up=gate_up,
        down=down,
        num_chosen=mixture.num_chosen,
        renormalises=mixture.renormalises,
    )
