"""The Llama family: Llama 2 and 3, Mistral, Mixtral, Qwen2, Qwen3 and its mixtures of experts, Phi-3, Gemma.

Pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward, or several.
What differs between the members is a field of `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Self

import torch
from torch import Tensor

from trireme.kernels import decoder_cpu, ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.low_bit_cpu import PackedLinear
from trireme.kernels.ops import LinearWeight
from trireme.kernels.static_decodes import StaticDecodes
from trireme.models.config import ModelConfig, RopeConfig
from trireme.models.decoder_layer import DecoderLayer, native_layer, read_layer
from trireme.models.model import LayerKv, forward_then_score
from trireme.models.rope import RopeTable
from trireme.models.weights import ModelWeights

_PREFIXES: Final = ("", "model.", "model.language_model.", "language_model.model.")
"""Of weights' names: of a body saved without its head, with it, and of models with images, new and old."""


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
        # Rounded to the type first, as the models were trained.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        self._scale = config.score_scale or 1.0 / math.sqrt(config.head_dim)
        self._rope = self._rope_table(config.rope or RopeConfig())
        self._local_rope = self._rope if config.local_rope is None else self._rope_table(config.local_rope)
        is_one_rope = self._local_rope is self._rope
        # Cached keys are turned alike in all layers, which is wrong where these have two rules.
        self.key_rotation = self._rope.key_rotation if is_one_rope else None
        self._native = self._native_decoder()
        self.step_bytes = ops.weight_bytes(head) + sum(layer.step_bytes for layer in layers)

    @classmethod
    def load(cls, weights: ModelWeights, *, max_positions: int) -> Self:
        """Read all weights.

        Raises:
            InvalidCheckpoint: a tensor is missing or has another shape than the configuration says.
        """
        config = weights.config
        prefix = next((each for each in _PREFIXES if f"{each}embed_tokens.weight" in weights), "model.")
        embedding_name = f"{prefix}embed_tokens.weight"
        embedding = weights.tensor(embedding_name, (config.vocab_size, config.hidden_size))
        return cls(
            config,
            embedding=embedding,
            layers=[read_layer(weights, prefix, layer) for layer in range(config.num_layers)],
            final_norm=weights.norm(f"{prefix}norm.weight", config.hidden_size),
            head=weights.head(embedding, embedding_name),
            max_positions=max_positions,
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        config = self.config
        eps, scale = config.norm_eps, self._scale
        is_static = isinstance(batch, StaticDecodes)
        if self._native is not None and not is_static and decoder_cpu.takes_kv(kv[0][0].dtype):
            return self._native.forward(self._embed(tokens), positions, kv, batch)[0]
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rotated = heads + kv_heads
        rotation = self._rope.at(positions)
        local_rotation = rotation if self._local_rope is self._rope else self._local_rope.at(positions)
        x = self._embed(tokens)  # (tokens, hidden)
        for layer, (k_cache, v_cache) in zip(self._layers, kv, strict=True):
            fused = ops.linear(ops.rms_norm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
            fused = fused.view(-1, rotated + kv_heads, head_dim)
            qk = fused[:, :rotated]
            if layer.qk_norm is not None:
                qk = ops.rms_norm(qk, layer.qk_norm, eps)
            qk = ops.rotary(qk, *(rotation if layer.window is None else local_rotation))
            ops.append_kv(qk[:, heads:], fused[:, rotated:], k_cache, v_cache, batch.slots)
            seen = ops.paged_attention(
                *(qk[:, :heads], k_cache, v_cache, batch),
                scale=scale,
                window=layer.window,
                cap=config.attention_cap,
            )
            if layer.post_attention_norm is None:
                x = ops.linear_add(seen, layer.out, x, layer.out_bias)
            else:
                made = ops.linear(seen, layer.out, layer.out_bias)
                x = x + ops.rms_norm(made, layer.post_attention_norm, eps)
            normed = ops.rms_norm(x, layer.mlp_norm, eps)
            if layer.post_mlp_norm is None:
                x = layer.feed_forward.forward(normed, x)
            else:
                x = x + ops.rms_norm(layer.feed_forward.output(normed), layer.post_mlp_norm, eps)
        return ops.rms_norm(x, self._final_norm, eps)

    def _embed(self, tokens: Tensor) -> Tensor:
        """(tokens, hidden)."""
        x = ops.embedding(self._embedding, tokens)
        if self.config.embedding_scale == 1.0:
            return x
        return x * self._embedding_scale

    def _rope_table(self, rope: RopeConfig) -> RopeTable:
        config = self.config
        return RopeTable(
            rope,
            head_dim=config.head_dim,
            max_positions=config.max_positions,
            num_positions=self.max_positions,
            device=self.device,
            dtype=self.dtype,
            rotary_dim=config.rotary_dim,
        )

    def _native_decoder(self) -> decoder_cpu.NativeDecoder | None:
        """All layers in one call, where the CPU's library takes them."""
        config = self.config
        rotation, local_rotation = self._rope.tables, self._local_rope.tables
        layers = [
            native_layer(layer, rotation if layer.window is None else local_rotation)
            for layer in self._layers
        ]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(layers) or not decoder_cpu.takes(
            found, config.head_dim, self.dtype, config.activation
        ):
            return None
        return decoder_cpu.NativeDecoder(
            found,
            decoder_cpu.HeadWeights(
                norm=self._final_norm,
                scores=self._head if isinstance(self._head, PackedLinear) else None,
                cap=config.logit_cap,
            ),
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
            scale=self._scale,
            cap=config.attention_cap,
            activation=config.activation,
        )

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        native = self._native
        if native is not None and native.vocabulary and decoder_cpu.takes_kv(kv[0][0].dtype):
            return native.forward(self._embed(tokens), positions, kv, batch, scored=scored)
        return forward_then_score(self, tokens, positions, kv, batch, scored)

    def logits(self, hidden: Tensor) -> Tensor:
        scores = ops.linear(hidden, self._head).float()
        cap = self.config.logit_cap
        return scores if cap is None else ops.soft_cap(scores, cap)
