"""What is taken from a prompt's final hidden states: log-probabilities, scores, vectors."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from trireme.engine.outputs import (
    EmbeddingOutput,
    FinishReason,
    ScoreOutput,
    TokenLogprobs,
    TokenOutput,
    not_a_number,
)
from trireme.engine.prompt_logprobs import prompt_logprobs
from trireme.engine.sequence import Sequence
from trireme.engine.tally import StepReport
from trireme.models.model import Model


class Progress(enum.Enum):
    """How far a sequence is."""

    GOES_ON = enum.auto()
    ENDED = enum.auto()
    """It has all of its own; others of its request go on."""
    ANSWERED = enum.auto()
    """Its request has its answer."""


def take_hidden(model: Model, sequence: Sequence, hidden: Tensor, start: int, report: StepReport) -> Progress:
    """Take a chunk's hidden states for what is asked of a prompt; the last chunk's answer is reported.

    Args:
        hidden: (tokens, hidden), from position `start` of the sequence on.

    Raises:
        RequestFailed: the model's scores are no numbers.
    """
    if sequence.prompt_logprobs is not None:
        return _take_prompt_logprobs(model, sequence, hidden, start, report)
    if sequence.group is not None:
        return _take_score(model, sequence, hidden, start, report)
    return _take_vector(sequence, hidden, report)


def tell_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs, ...] | None:
    """Those of its prompt, once; None: they were not asked for, or were told."""
    found, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    return None if found is None else tuple(found.rows)


def _is_computed(sequence: Sequence) -> bool:
    return sequence.num_computed == sequence.num_target


def _take_prompt_logprobs(
    model: Model, sequence: Sequence, hidden: Tensor, start: int, report: StepReport
) -> Progress:
    wanted = sequence.prompt_logprobs
    assert wanted is not None
    following = sequence.token_ids[start + 1 : min(start + hidden.shape[0] + 1, sequence.num_prompt)]
    wanted.rows += prompt_logprobs(model, hidden, following, num_top=wanted.num_top)
    if not (sequence.has_no_answer and _is_computed(sequence)):
        return Progress.GOES_ON
    report.outputs.append(
        TokenOutput(
            sequence.sequence_id,
            0,
            None,
            finish_reason=FinishReason.LENGTH,
            cached_tokens=sequence.cached_tokens,
            prompt_logprobs=tell_prompt_logprobs(sequence),
        )
    )
    return Progress.ANSWERED


def _take_score(model: Model, sequence: Sequence, hidden: Tensor, start: int, report: StepReport) -> Progress:
    group = sequence.group
    assert group is not None
    total = _continuation_logprob(model, hidden, sequence, start)
    if math.isnan(total):
        raise not_a_number()
    group.logprobs[sequence.member] += total
    if not _is_computed(sequence):
        return Progress.GOES_ON
    if group.num_open > 1:
        group.num_open -= 1
        return Progress.ENDED
    cached = sum(member.cached_tokens or 0 for member in group.members)
    report.scores.append(ScoreOutput(group.sequence_id, tuple(group.logprobs), cached))
    return Progress.ANSWERED


def _take_vector(sequence: Sequence, hidden: Tensor, report: StepReport) -> Progress:
    chunk = hidden.float().sum(0)
    sequence.hidden_sum = chunk if sequence.hidden_sum is None else sequence.hidden_sum + chunk
    if not _is_computed(sequence):
        return Progress.GOES_ON
    vector = _pooled(sequence.hidden_sum)
    if not all(map(math.isfinite, vector)):
        raise not_a_number()
    report.embeddings.append(EmbeddingOutput(sequence.sequence_id, vector, sequence.cached_tokens or 0))
    return Progress.ANSWERED


def _continuation_logprob(model: Model, hidden: Tensor, sequence: Sequence, start: int) -> float:
    """Log-probability of the continuation's tokens that follow this chunk's positions.

    Args:
        hidden: (tokens, hidden) of the sequence's positions from `start` on.
    """
    skipped = max(0, sequence.num_prompt - 1 - start)
    if skipped >= hidden.shape[0]:
        return 0.0
    first = start + skipped + 1
    following = sequence.token_ids[first : first + hidden.shape[0] - skipped]
    logprobs = model.logits(hidden[skipped:]).log_softmax(-1)
    wanted = torch.tensor(following, device=hidden.device)[:, None]
    total: float = logprobs.gather(1, wanted).double().sum().item()
    return total


def _pooled(hidden_sum: Tensor) -> tuple[float, ...]:
    """The direction of the sum of hidden states (hidden,): their mean, scaled to length 1."""
    vector: list[float] = torch.nn.functional.normalize(hidden_sum, dim=0).tolist()
    return tuple(vector)
