"""How likely the tokens of a prompt were, each behind those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trireme.engine.outputs import TokenLogprobs, not_a_number
from trireme.models.model import Model

ROWS = 128
"""Positions whose scores are in memory at once: a chunk's may be as large as the model."""


@dataclass(slots=True)
class PromptLogprobs:
    """Of one sequence, as far as it is computed."""

    num_top: int
    """Likeliest tokens to tell beside each."""
    rows: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""


def prompt_logprobs(
    model: Model, hidden: Tensor, following: Sequence[int], *, num_top: int
) -> list[TokenLogprobs]:
    """The log-probability of each of `following`, and the likeliest tokens in its place.

    Args:
        hidden: (tokens, hidden) of the positions before them, one each.

    Raises:
        RequestFailed: the model's scores are no numbers.
    """
    found: list[TokenLogprobs] = []
    num_top = min(num_top, model.config.vocab_size)
    for first in range(0, len(following), ROWS):
        wanted = torch.tensor(following[first : first + ROWS], device=hidden.device)[:, None]
        logprobs = model.logits(hidden[first : first + len(wanted)]).log_softmax(-1)
        values: list[float] = logprobs.gather(1, wanted)[:, 0].tolist()
        if any(map(math.isnan, values)):
            raise not_a_number()
        top = logprobs.topk(num_top, dim=-1)
        for value, ids, likeliest in zip(values, top.indices.tolist(), top.values.tolist(), strict=True):
            found.append((value, tuple(zip(ids, likeliest, strict=True))))
    return found
