"""Encoders of the BERT family: attention in both directions, no cache.

Source: Devlin et al., BERT, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.kernels import ops
from trireme.kernels.ops import LinearWeight
from trireme.models.config import EncoderConfig, ModelConfig
from trireme.models.encoder_head import EncoderHead, read_head
from trireme.models.weights import ModelWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """One layer's weights, those of one input fused."""

    qkv: LinearWeight
    """(3 * hidden, hidden)."""
    qkv_bias: Tensor
    out: LinearWeight
    out_bias: Tensor
    attention_norm: tuple[Tensor, Tensor]
    """Weight and bias, (hidden,) each."""
    up: LinearWeight
    up_bias: Tensor
    down: LinearWeight
    down_bias: Tensor
    mlp_norm: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Names:
    """What an architecture calls its parts, below `encoder.layer.N.`."""

    layers: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


_BERT: Final = _Names(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_DISTILBERT: Final = _Names(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)
_PREFIXES: Final = ("", "bert.", "roberta.", "distilbert.")
"""Of weights' names: of a body saved alone, and with a head."""


class Encoder:
    """An encoder over a flattened batch: all tokens of all texts, one after the other."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderConfig,
        *,
        embedding: Tensor,
        position_embedding: Tensor,
        type_embedding: Tensor | None,
        embedding_norm: tuple[Tensor, Tensor],
        layers: Sequence[EncoderLayer],
        head: EncoderHead | None,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.head = head
        self._encoder = encoder
        self._embedding = embedding
        self._position_embedding = position_embedding
        self._type_embedding = type_embedding
        self._embedding_norm = embedding_norm
        self._layers = tuple(layers)
        products = [weight for each in layers for weight in (each.qkv, each.out, each.up, each.down)]
        self.step_bytes = sum(map(ops.weight_bytes, products))
        """Bytes of linear weights that a step reads."""

    @classmethod
    def load(cls, weights: ModelWeights) -> Self:
        """Read all weights.

        Raises:
            InvalidCheckpoint: a tensor is missing or has another shape than the configuration says.
        """
        config = weights.config
        encoder = config.encoder
        assert encoder is not None
        hidden = config.hidden_size
        word = "embeddings.word_embeddings.weight"
        prefix = next((each for each in _PREFIXES if each + word in weights), _PREFIXES[1])
        offset = 0 if encoder.padding_id is None else encoder.padding_id + 1

        def read(name: str, *shape: int) -> Tensor:
            return weights.tensor(f"{prefix}{name}", shape)

        names = _DISTILBERT if config.model_type == "distilbert" else _BERT
        return cls(
            config,
            encoder,
            embedding=read(word, config.vocab_size, hidden),
            position_embedding=read(
                "embeddings.position_embeddings.weight", config.max_positions + offset, hidden
            ),
            type_embedding=(
                read("embeddings.token_type_embeddings.weight", encoder.token_types, hidden)[0]
                if encoder.token_types
                else None
            ),
            embedding_norm=_read_norm(weights, f"{prefix}embeddings.LayerNorm"),
            layers=[
                _read_layer(weights, f"{prefix}{names.layers}.{index}.", names)
                for index in range(config.num_layers)
            ],
            head=read_head(weights, prefix) if encoder.labels else None,
        )

    def forward(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The final hidden states of texts of token ids, none empty or over `max_positions`.

        Returns:
            (tokens, hidden) of each.
        """
        config, eps = self.config, self.config.norm_eps
        heads, head_dim = config.num_heads, config.head_dim
        lengths = [len(text) for text in texts]
        tokens = torch.tensor([token for text in texts for token in text], device=self.device)
        x = self._embedding.index_select(0, tokens)
        if self._type_embedding is not None:
            x = x + self._type_embedding
        x = x + self._position_embedding.index_select(0, self._positions(tokens, lengths))
        x = ops.layer_norm(x, *self._embedding_norm, eps)
        for layer in self._layers:
            fused = ops.linear(x, layer.qkv, layer.qkv_bias).view(-1, 3, heads, head_dim)
            seen = [self._attend(part) for part in torch.split(fused, lengths)]
            x = ops.linear_add(torch.cat(seen), layer.out, x, layer.out_bias)
            x = ops.layer_norm(x, *layer.attention_norm, eps)
            inner = ops.activation(ops.linear(x, layer.up, layer.up_bias), config.activation)
            x = ops.layer_norm(ops.linear_add(inner, layer.down, x, layer.down_bias), *layer.mlp_norm, eps)
        return list(torch.split(x, lengths))

    def _attend(self, fused: Tensor) -> Tensor:
        """One text: (tokens, 3, heads, head_dim) to (tokens, heads * head_dim)."""
        q, k, v = fused.permute(1, 2, 0, 3)
        scale = 1.0 / math.sqrt(self.config.head_dim)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        return out.transpose(0, 1).reshape(fused.shape[0], -1)

    def _positions(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        padding = self._encoder.padding_id
        if padding is None:
            return torch.cat([torch.arange(length, device=self.device) for length in lengths])
        parts = []
        for text in torch.split(tokens, list(lengths)):
            counts = (text != padding).long()
            parts.append(counts.cumsum(0) * counts + padding)
        return torch.cat(parts)


def _read_layer(weights: ModelWeights, at: str, names: _Names) -> EncoderLayer:
    config = weights.config
    hidden, inner = config.hidden_size, config.intermediate_size

    def affine(parts: Sequence[str], inputs: int, outputs: int) -> tuple[LinearWeight, Tensor]:
        matrix = weights.linear([(f"{at}{name}.weight", outputs) for name in parts], inputs)
        return matrix, torch.cat([weights.tensor(f"{at}{name}.bias", (outputs,)) for name in parts])

    qkv, qkv_bias = affine((names.query, names.key, names.value), hidden, hidden)
    out, out_bias = affine((names.out,), hidden, hidden)
    up, up_bias = affine((names.up,), hidden, inner)
    down, down_bias = affine((names.down,), inner, hidden)
    return EncoderLayer(
        qkv=qkv,
        qkv_bias=qkv_bias,
        out=out,
        out_bias=out_bias,
        attention_norm=_read_norm(weights, f"{at}{names.attention_norm}"),
        up=up,
        up_bias=up_bias,
        down=down,
        down_bias=down_bias,
        mlp_norm=_read_norm(weights, f"{at}{names.mlp_norm}"),
    )


def _read_norm(weights: ModelWeights, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, which the oldest files call gamma and beta."""
    parts = ("gamma", "beta") if f"{name}.gamma" in weights else ("weight", "bias")
    weight, bias = (weights.tensor(f"{name}.{part}", (weights.config.hidden_size,)) for part in parts)
    return weight, bias
