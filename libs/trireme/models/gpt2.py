"""GPT-2: pre-norm blocks with biases, learned positions, GELU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from trireme.kernels import ops
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.ops import LinearWeight
from trireme.models.config import ModelConfig
from trireme.models.model import LayerKv, forward_then_score
from trireme.models.weights import ModelWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Weight (outputs, inputs) and bias (outputs,) of a linear layer."""

    weight: LinearWeight
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Weight and bias, each (width,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Layer:
    """One layer's weights."""

    input_norm: Norm
    qkv: Affine
    out: Affine
    mlp_norm: Norm
    up: Affine
    down: Affine
    scale: float


class Gpt2:
    """GPT-2; meets the `Model` protocol."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor,
        position_embedding: Tensor,
        layers: Sequence[Gpt2Layer],
        final_norm: Norm,
        head: LinearWeight,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.max_positions = config.max_positions
        self.key_rotation = None  # The position enters before the first layer.
        self._embedding = embedding
        self._position_embedding = position_embedding
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._head = head
        products = [
            layer_part.weight for each in layers for layer_part in (each.qkv, each.out, each.up, each.down)
        ]
        self.step_bytes = sum(map(ops.weight_bytes, (*products, head)))

    @classmethod
    def load(cls, weights: ModelWeights) -> Self:
        """Read all weights.

        Raises:
            InvalidCheckpoint: a tensor is missing or has another shape than the configuration says.
        """
        config = weights.config
        hidden, inner = config.hidden_size, config.intermediate_size
        prefix = "" if "wte.weight" in weights else "transformer."  # the oldest files have no prefix

        def read(name: str, *shape: int) -> Tensor:
            return weights.tensor(f"{prefix}{name}", shape)

        def norm(name: str) -> Norm:
            return Norm(weight=read(f"{name}.weight", hidden), bias=read(f"{name}.bias", hidden))

        def affine(name: str, inputs: int, outputs: int) -> Affine:
            parts = [(f"{prefix}{name}.weight", outputs)]
            return Affine(
                weight=weights.linear(parts, inputs, is_transposed=True), bias=read(f"{name}.bias", outputs)
            )

        layers = []
        for index in range(config.num_layers):
            at = f"h.{index}."
            scale = 1.0 / math.sqrt(config.head_dim) if config.scale_by_head_dim else 1.0
            layers.append(
                Gpt2Layer(
                    input_norm=norm(f"{at}ln_1"),
                    qkv=affine(f"{at}attn.c_attn", hidden, 3 * hidden),
                    out=affine(f"{at}attn.c_proj", hidden, hidden),
                    mlp_norm=norm(f"{at}ln_2"),
                    up=affine(f"{at}mlp.c_fc", hidden, inner),
                    down=affine(f"{at}mlp.c_proj", inner, hidden),
                    scale=scale / (index + 1) if config.scale_by_layer else scale,
                )
            )
        embedding = read("wte.weight", config.vocab_size, hidden)
        return cls(
            config,
            embedding=embedding,
            position_embedding=read("wpe.weight", config.max_positions, hidden),
            layers=layers,
            final_norm=norm("ln_f"),
            head=weights.head(embedding, f"{prefix}wte.weight"),
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        config = self.config
        eps, heads, head_dim = config.norm_eps, config.num_heads, config.head_dim
        x = self._embedding.index_select(0, tokens) + self._position_embedding.index_select(0, positions)
        for layer, (k_cache, v_cache) in zip(self._layers, kv, strict=True):
            normed = ops.layer_norm(x, layer.input_norm.weight, layer.input_norm.bias, eps)
            fused = ops.linear(normed, layer.qkv.weight, layer.qkv.bias).view(-1, 3 * heads, head_dim)
            q, k, v = fused[:, :heads], fused[:, heads : 2 * heads], fused[:, 2 * heads :]
            ops.append_kv(k, v, k_cache, v_cache, batch.slots)
            seen = ops.paged_attention(q, k_cache, v_cache, batch, scale=layer.scale)
            x = ops.linear_add(seen, layer.out.weight, x, layer.out.bias)
            normed = ops.layer_norm(x, layer.mlp_norm.weight, layer.mlp_norm.bias, eps)
            inner = ops.activation(ops.linear(normed, layer.up.weight, layer.up.bias), config.activation)
            x = ops.linear_add(inner, layer.down.weight, x, layer.down.bias)
        return ops.layer_norm(x, self._final_norm.weight, self._final_norm.bias, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self._head).float()

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return forward_then_score(self, tokens, positions, kv, batch, scored)
