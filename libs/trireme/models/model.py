"""What the engine asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trireme.kernels.attention_batch import AttentionBatch
from trireme.models.config import ModelConfig
from trireme.models.rope import KeyRotation

LayerKv = tuple[Tensor, Tensor]
"""One layer's cache of keys and of values, each (blocks, block_size, kv_heads, row): `kernels.kv_forms`."""


class Model(Protocol):
    """A decoder over a flattened batch: all tokens of all sequences, one after the other."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: of the hidden states, and of the KV cache unless that is told otherwise."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie and the batch must lie."""

    @property
    def max_positions(self) -> int:
        """Positions must be below this."""

    @property
    def key_rotation(self) -> KeyRotation | None:
        """Moves cached keys to other positions; None: they must be computed again there."""

    @property
    def step_bytes(self) -> int:
        """Bytes of linear weights that a step of one token reads."""

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        """Run the layers, writing the tokens' keys and values into `kv`.

        Args:
            tokens, positions: (tokens,) int64.
            kv: one pair per layer.
            batch: the sequences these tokens belong to.

        Returns:
            (tokens, hidden): the final hidden states, normalised.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, (rows, vocab) float32, for rows of hidden states (rows, hidden)."""

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and `logits` of some of its rows, in one go where that is faster.

        Args:
            tokens, positions, kv, batch: as of `forward`.
            scored: (rows,) int64: those rows; None: all of them.

        Returns:
            What `forward` and `logits` return.
        """


def forward_then_score(
    model: Model,
    tokens: Tensor,
    positions: Tensor,
    kv: Sequence[LayerKv],
    batch: AttentionBatch,
    scored: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`Model.forward_scored` of a model that does one after the other."""
    hidden = model.forward(tokens, positions, kv, batch)
    return hidden, model.logits(hidden if scored is None else hidden[scored])
