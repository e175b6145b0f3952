"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.
What differs between the members is a field of `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trireme.kernels import decoder_cpu, ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.low_bit_cpu import PackedLinear
from trireme.kernels.ops import LinearWeight
from trireme.models.config import ModelConfig, RopeConfig
from trireme.models.model import LayerKv
from trireme.models.rope import RopeTable
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
    mlp_norm: Tensor
    gate_up: LinearWeight
    """(2 * intermediate, hidden): gate, up."""
    gate_up_bias: Tensor | None
    down: LinearWeight
    down_bias: Tensor | None
    window: int | None


class Decoder:
    """A model of the Llama family; meets the `Model` protocol."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        head: LinearWeight,
        max_positions: int,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.max_positions = max_positions
        self._embedding = embedding
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._head = head
        self._scale = 1.0 / math.sqrt(config.head_dim)
        self._rope = RopeTable(
            config.rope or RopeConfig(),
            head_dim=config.head_dim,
            max_positions=config.max_positions,
            num_positions=max_positions,
            device=self.device,
            dtype=self.dtype,
        )
        self.key_rotation = self._rope.key_rotation
        self._native = self._native_layers()

    @classmethod
    def load(cls, weights: ModelWeights, *, max_positions: int) -> Self:
        """Read all weights.

        Raises:
            InvalidCheckpoint: a tensor is missing or has another shape than the configuration says.
        """
        config = weights.config
        # Without the prefix: a body saved without its head.
        prefix = "" if "embed_tokens.weight" in weights else "model."
        embedding_name = f"{prefix}embed_tokens.weight"
        embedding = weights.tensor(embedding_name, (config.vocab_size, config.hidden_size))
        return cls(
            config,
            embedding=embedding,
            layers=[_read_layer(weights, prefix, layer) for layer in range(config.num_layers)],
            final_norm=weights.tensor(f"{prefix}norm.weight", (config.hidden_size,)),
            head=weights.head(embedding, embedding_name),
            max_positions=max_positions,
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        config = self.config
        eps, scale = config.norm_eps, self._scale
        if self._native is not None and decoder_cpu.takes_kv(kv[0][0].dtype):
            x = self._embedding.index_select(0, tokens)
            self._native.forward(x, positions, kv, batch)
            return ops.rms_norm(x, self._final_norm, eps)
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rotated = heads + kv_heads
        cos, sin = self._rope.at(positions)
        x = self._embedding.index_select(0, tokens)  # (tokens, hidden)
        for layer, (k_cache, v_cache) in zip(self._layers, kv, strict=True):
            fused = ops.linear(ops.rms_norm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
            fused = fused.view(-1, rotated + kv_heads, head_dim)
            qk = fused[:, :rotated]
            if layer.qk_norm is not None:
                qk = ops.rms_norm(qk, layer.qk_norm, eps)
            qk = ops.rotary(qk, cos, sin)
            ops.append_kv(qk[:, heads:], fused[:, rotated:], k_cache, v_cache, batch.slots)
            seen = ops.paged_attention(
                qk[:, :heads], k_cache, v_cache, batch, scale=scale, window=layer.window
            )
            x = ops.linear_add(seen, layer.out, x, layer.out_bias)
            gate_up = ops.linear(ops.rms_norm(x, layer.mlp_norm, eps), layer.gate_up, layer.gate_up_bias)
            x = ops.linear_add(ops.swiglu(gate_up), layer.down, x, layer.down_bias)
        return ops.rms_norm(x, self._final_norm, eps)

    def _native_layers(self) -> decoder_cpu.DecoderLayers | None:
        """All layers in one call, where the CPU's library takes them."""
        config = self.config
        layers = [_native_layer(layer) for layer in self._layers]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(layers) or not decoder_cpu.takes(found, config.head_dim, self.dtype):
            return None
        cosines, sines = self._rope.tables
        return decoder_cpu.DecoderLayers(
            found,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
            scale=self._scale,
            cosines=cosines,
            sines=sines,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self._head).float()


def _native_layer(layer: DecoderLayer) -> decoder_cpu.LayerWeights | None:
    """None: not all of its products are packed for the CPU's library."""
    match layer.qkv, layer.out, layer.gate_up, layer.down:
        case PackedLinear() as qkv, PackedLinear() as out, PackedLinear() as gate_up, PackedLinear() as down:
            return decoder_cpu.LayerWeights(
                qkv=qkv,
                out=out,
                gate_up=gate_up,
                down=down,
                input_norm=layer.input_norm,
                mlp_norm=layer.mlp_norm,
                qk_norm=layer.qk_norm,
                qkv_bias=layer.qkv_bias,
                out_bias=layer.out_bias,
                gate_up_bias=layer.gate_up_bias,
                down_bias=layer.down_bias,
                window=layer.window,
            )
    return None


def _read_layer(weights: ModelWeights, prefix: str, index: int) -> DecoderLayer:
    config = weights.config
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    at = f"{prefix}layers.{index}."

    def matrix(parts: Sequence[Part], inputs: int) -> LinearWeight:
        return weights.linear([(f"{at}{name}.weight", rows) for name, rows in parts], inputs)

    def bias(parts: Sequence[Part], wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.cat([weights.tensor(f"{at}{name}.bias", (rows,)) for name, rows in parts])

    qkv = (("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows))
    out = (("self_attn.o_proj", hidden),)
    gate_up = (("mlp.gate_proj", inner), ("mlp.up_proj", inner))
    down = (("mlp.down_proj", hidden),)
    qk_norm = None
    if config.qk_norm:
        q_norm = weights.tensor(f"{at}self_attn.q_norm.weight", (head_dim,))
        k_norm = weights.tensor(f"{at}self_attn.k_norm.weight", (head_dim,))
        qk_norm = torch.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
    return DecoderLayer(
        input_norm=weights.tensor(f"{at}input_layernorm.weight", (hidden,)),
        qkv=matrix(qkv, hidden),
        qkv_bias=bias(qkv, config.qkv_bias),
        qk_norm=qk_norm,
        out=matrix(out, q_rows),
        out_bias=bias(out, config.out_bias),
        mlp_norm=weights.tensor(f"{at}post_attention_layernorm.weight", (hidden,)),
        gate_up=matrix(gate_up, hidden),
        gate_up_bias=bias(gate_up, config.mlp_bias),
        down=matrix(down, inner),
        down_bias=bias(down, config.mlp_bias),
        window=config.windows[index],
    )
