"""What follows attention in a layer: a gated feed-forward, or several of which each token uses a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trireme.kernels import ops
from trireme.kernels.ops import ExpertWeights, LinearWeight
from trireme.models.config import ModelConfig
from trireme.models.weights import ModelWeights, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFeedForward:
    """down(act(gate(x)) * up(x)), the two weights of one input fused."""

    gate_up: LinearWeight
    """(2 * intermediate, hidden): gate, up."""
    gate_up_bias: Tensor | None
    down: LinearWeight
    down_bias: Tensor | None
    activation: str
    """Of the gate: silu or gelu_new."""

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return ops.weight_bytes(self.gate_up) + ops.weight_bytes(self.down)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(tokens, hidden) both."""
        return ops.linear_add(self._inner(x), self.down, residual, self.down_bias)

    def output(self, x: Tensor) -> Tensor:
        """Without the residual stream: (tokens, hidden)."""
        return ops.linear(self._inner(x), self.down, self.down_bias)

    def _inner(self, x: Tensor) -> Tensor:
        return ops.gated(ops.linear(x, self.gate_up, self.gate_up_bias), self.activation)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureFeedForward:
    """The experts that a router chooses for each token, weighted by what it makes of them.

    Source: Jiang et al., Mixtral of Experts, 2024.
    """

    router: Tensor
    """(experts, hidden)."""
    gate_up: ExpertWeights
    """Of each expert, (2 * inner, hidden)."""
    down: ExpertWeights
    num_chosen: int
    renormalises: bool
    """The chosen experts' shares sum to 1."""

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        experts = ops.weight_bytes(self.gate_up) + ops.weight_bytes(self.down)
        return experts * self.num_chosen // len(self.router) + ops.weight_bytes(self.router)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(tokens, hidden) both."""
        shares, experts = ops.choose_experts(
            x, self.router, num_chosen=self.num_chosen, renormalises=self.renormalises
        )
        return ops.mixture_add(x, shares, experts, self.gate_up, self.down, residual)

    def output(self, x: Tensor) -> Tensor:
        """Without the residual stream: (tokens, hidden)."""
        return self.forward(x, torch.zeros_like(x))


FeedForward = DenseFeedForward | MixtureFeedForward


def read_feed_forward(weights: ModelWeights, at: str, index: int) -> FeedForward:
    """Layer `index`'s, whose weights' names begin with `at`.

    Raises:
        InvalidCheckpoint: a tensor is missing or has another shape.
    """
    config = weights.config
    mixture = config.mixture
    if mixture is None or not mixture.layers[index]:
        return _read_dense(weights, at, config)
    hidden, inner = config.hidden_size, mixture.intermediate_size
    base, gate, up, down = _EXPERT_NAMES[config.model_type]

    def matrix(expert: int, parts: Sequence[tuple[str, int]], inputs: int) -> LinearWeight:
        named = [(f"{at}{base}.experts.{expert}.{name}.weight", rows) for name, rows in parts]
        return weights.linear(named, inputs)

    experts = range(mixture.num_experts)
    gate_ups, downs = ops.pack_experts(
        [matrix(expert, ((gate, inner), (up, inner)), hidden) for expert in experts],
        [matrix(expert, ((down, hidden),), inner) for expert in experts],
    )
    return MixtureFeedForward(
        router=weights.tensor(f"{at}{base}.gate.weight", (mixture.num_experts, hidden)),
        gate_up=gate_ups,
        down=downs,
        num_chosen=mixture.num_chosen,
        renormalises=mixture.renormalises,
    )


_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""By model type: where the experts are, and what gate, up and down are called."""


def _read_dense(weights: ModelWeights, at: str, config: ModelConfig) -> DenseFeedForward:
    hidden, inner = config.hidden_size, config.intermediate_size

    def bias(parts: Sequence[Part]) -> Tensor | None:
        if not config.mlp_bias:
            return None
        return torch.cat([weights.tensor(f"{name}.bias", (rows,)) for name, rows in parts])

    def matrix(parts: Sequence[Part], inputs: int) -> LinearWeight:
        return weights.linear([(f"{name}.weight", rows) for name, rows in parts], inputs)

    gate_up: tuple[Part, ...] = ((f"{at}mlp.gate_up_proj", 2 * inner),)
    if not config.fused_projections:
        gate_up = ((f"{at}mlp.gate_proj", inner), (f"{at}mlp.up_proj", inner))
    down = ((f"{at}mlp.down_proj", hidden),)
    return DenseFeedForward(
        gate_up=matrix(gate_up, hidden),
        gate_up_bias=bias(gate_up),
        down=matrix(down, inner),
        down_bias=bias(down),
        activation=config.activation,
    )
