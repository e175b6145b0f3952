"""What tells classes apart by a text's first hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.models.weights import ModelWeights

_NAMES: Final = {
    "bert": ("{prefix}pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}
"""By model type: the layer between, the one that scores, and what stands between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderHead:
    """Two small linear layers."""

    dense: tuple[Tensor, Tensor]
    """Weight (hidden, hidden) and bias."""
    scores: tuple[Tensor, Tensor]
    """Weight (labels, hidden) and bias."""
    activation: str
    """tanh or relu."""
    is_multi_label: bool

    def logits(self, first: Tensor) -> Tensor:
        """Scores of the classes, (texts, labels) float32, for first hidden states (texts, hidden)."""
        inner = F.linear(first, *self.dense)
        inner = torch.tanh(inner) if self.activation == "tanh" else F.relu(inner)
        return F.linear(inner, *self.scores).float()

    def logprobs(self, first: Tensor) -> Tensor:
        """Log-probabilities of the classes, (texts, labels) float32."""
        logits = self.logits(first)
        return F.logsigmoid(logits) if self.is_multi_label else logits.log_softmax(-1)


def read_head(weights: ModelWeights, prefix: str) -> EncoderHead:
    """The head of a checkpoint that has labels; `prefix`: of its body's names.

    Raises:
        InvalidCheckpoint: a tensor is missing or has another shape.
    """
    config = weights.config
    assert config.encoder is not None
    dense, scores, activation = _NAMES[config.model_type]
    dense = dense.format(prefix=prefix)
    hidden, labels = config.hidden_size, len(config.encoder.labels)
    return EncoderHead(
        dense=(
            weights.tensor(f"{dense}.weight", (hidden, hidden)),
            weights.tensor(f"{dense}.bias", (hidden,)),
        ),
        scores=(
            weights.tensor(f"{scores}.weight", (labels, hidden)),
            weights.tensor(f"{scores}.bias", (labels,)),
        ),
        activation=activation,
        is_multi_label=config.encoder.is_multi_label,
    )
