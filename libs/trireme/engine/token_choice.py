"""Who chooses the tokens of a step, and when they are known.

Choosing is begun as soon as a batch's scores are on their way, and waited for when its tokens are needed:
where another device computes, the host goes on in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from trireme.engine.sampling import Sampled, SamplingState, sample
from trireme.engine.speculation.token_tree import TokenTree


class Choices(NamedTuple):
    """What a batch's sequences chose."""

    sampled: list[Sampled]
    """For each sequence one, and one for every token drafted for it: what it chooses after that one."""
    paths: Sequence[Sequence[int]]
    """Of each sequence, the places of the drafted tokens that are right: see `TokenTree.walk`. Empty where
    nothing was drafted."""


class Choosing(Protocol):
    """Choices on their way."""

    def wait(self) -> Choices:
        """They are there."""


class Chooser(Protocol):
    """Chooses tokens."""

    def begin(self, logits: Tensor, states: Sequence[SamplingState], drafts: Sequence[TokenTree]) -> Choosing:
        """Begin to choose; `logits` stay as they are.

        Args:
            logits: (rows, vocab) float32: for each sequence a row, and one for every token drafted for it.
            states: of each sequence.
            drafts: for each sequence; empty: nothing was drafted for any.

        Raises:
            Exception: of one of the sequences. The same may be asked again for fewer of them.
        """

    def forget(self, state: SamplingState) -> None:
        """The sequence has ended."""


class TorchChooser:
    """By PyTorch's operators, wherever the scores are: `sampling.sample`. Meets `Chooser`."""

    def begin(self, logits: Tensor, states: Sequence[SamplingState], drafts: Sequence[TokenTree]) -> Choosing:
        if not drafts:
            return Chosen(Choices(sample(logits, states), ()))
        sampled = sample(logits, with_drafts(states, drafts))
        return Chosen(Choices(sampled, paths([one.token_id for one in sampled], drafts)))

    def forget(self, state: SamplingState) -> None:
        pass  # a state holds all that is known of it


class Chosen:
    """Choices that are known. Meets `Choosing`."""

    __slots__ = ("_choices",)

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def wait(self) -> Choices:
        return self._choices


def with_drafts(states: Sequence[SamplingState], drafts: Sequence[TokenTree]) -> Sequence[SamplingState]:
    """The state of every row: each sequence's, and what it will be after each token drafted for it."""
    if not drafts:
        return states
    rows: list[SamplingState] = []
    for state, draft in zip(states, drafts, strict=True):
        rows.append(state)
        rows.extend(map(state.after, draft.prefixes()))
    return rows


def paths(token_ids: Sequence[int], drafts: Sequence[TokenTree]) -> list[tuple[int, ...]]:
    """Of each sequence, the places of the drafted tokens that are right.

    Args:
        token_ids: chosen, a row each.
    """
    found = []
    row = 0
    for draft in drafts:
        found.append(draft.walk(token_ids[row : row + 1 + len(draft)]))
        row += 1 + len(draft)
    return found
