"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.
What differs between the members is a field of `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trireme.kernels import ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.models.checkpoint import Checkpoint
from trireme.models.config import ModelConfig, RopeConfig
from trireme.models.model import LayerKv
from trireme.models.rope import RopeTable

Read = Callable[[str, tuple[int, ...]], Tensor]
"""Reads a named tensor of a given shape onto the model's device, in its type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer's weights, those of one input fused; matrices as `ops.pack_weight` leaves them."""

    input_norm: Tensor
    qkv: Tensor
    """((heads + 2 * kv_heads) * head_dim, hidden): queries, keys, values."""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """(heads + kv_heads, head_dim)."""
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    """(2 * intermediate, hidden): gate, up."""
    gate_up_bias: Tensor | None
    down: Tensor
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
        head: Tensor,
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

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, max_positions: int
    ) -> Self:
        """Read all weights of `checkpoint` onto `device`.

        Raises:
            InvalidCheckpoint: a tensor is missing or has another shape than the configuration says.
        """
        config = checkpoint.config

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            return checkpoint.tensor(name, shape).to(device, dtype)

        prefix = (
            "" if "embed_tokens.weight" in checkpoint else "model."
        )  # bare: a body saved without its head
        table = (config.vocab_size, config.hidden_size)
        embedding = read(f"{prefix}embed_tokens.weight", table)
        return cls(
            config,
            embedding=embedding,
            layers=[_read_layer(config, read, prefix, layer) for layer in range(config.num_layers)],
            final_norm=read(f"{prefix}norm.weight", (config.hidden_size,)),
            head=ops.pack_weight(embedding if config.tie_embeddings else read("lm_head.weight", table)),
            max_positions=max_positions,
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        config = self.config
        eps, scale = config.norm_eps, self._scale
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

    def logits(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self._head).float()


def _read_layer(config: ModelConfig, read: Read, prefix: str, index: int) -> DecoderLayer:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    at = f"{prefix}layers.{index}."

    def fused(parts: Sequence[tuple[str, int]], wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.cat([read(f"{at}{name}.bias", (rows,)) for name, rows in parts])

    def weights(parts: Sequence[tuple[str, int]]) -> Tensor:
        return torch.cat([read(f"{at}{name}.weight", (rows, hidden)) for name, rows in parts])

    qkv = (("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows))
    gate_up = (("mlp.gate_proj", inner), ("mlp.up_proj", inner))
    qk_norm = None
    if config.qk_norm:
        q_norm = read(f"{at}self_attn.q_norm.weight", (head_dim,))
        k_norm = read(f"{at}self_attn.k_norm.weight", (head_dim,))
        qk_norm = torch.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
    return DecoderLayer(
        input_norm=read(f"{at}input_layernorm.weight", (hidden,)),
        qkv=ops.pack_weight(weights(qkv)),
        qkv_bias=fused(qkv, config.qkv_bias),
        qk_norm=qk_norm,
        out=ops.pack_weight(read(f"{at}self_attn.o_proj.weight", (hidden, q_rows))),
        out_bias=read(f"{at}self_attn.o_proj.bias", (hidden,)) if config.out_bias else None,
        mlp_norm=read(f"{at}post_attention_layernorm.weight", (hidden,)),
        gate_up=ops.pack_weight(weights(gate_up)),
        gate_up_bias=fused(gate_up, config.mlp_bias),
        down=ops.pack_weight(read(f"{at}mlp.down_proj.weight", (hidden, inner))),
        down_bias=read(f"{at}mlp.down_proj.bias", (hidden,)) if config.mlp_bias else None,
        window=config.windows[index],
    )
