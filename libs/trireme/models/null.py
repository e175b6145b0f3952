"""A model that computes nothing: what remains of a step's time is the engine's own.

The token after t is t + 1 modulo the vocabulary, so an answer is a known cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trireme.kernels.attention_batch import AttentionBatch
from trireme.models.config import Family, ModelConfig
from trireme.models.model import LayerKv, forward_then_score


class NullModel:
    """Counts upwards; meets the `Model` protocol with no layers and no cache."""

    def __init__(self, *, vocab_size: int = 4096, max_positions: int = 1 << 20) -> None:
        self.config = ModelConfig(
            model_type="null",
            family=Family.LLAMA,
            vocab_size=vocab_size,
            hidden_size=1,
            intermediate_size=1,
            num_layers=0,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            max_positions=max_positions,
            norm_eps=1e-6,
            activation="silu",
            tie_embeddings=True,
        )
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.max_positions = max_positions
        self.key_rotation = None
        self.step_bytes = 0
        self._answers = torch.eye(vocab_size) if vocab_size <= 4096 else None

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        return ((tokens + 1) % self.config.vocab_size).unsqueeze(1)

    def logits(self, hidden: Tensor) -> Tensor:
        if self._answers is not None:
            return self._answers.index_select(0, hidden.view(-1))
        return torch.zeros(hidden.shape[0], self.config.vocab_size).scatter_(1, hidden, 1.0)

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return forward_then_score(self, tokens, positions, kv, batch, scored)
