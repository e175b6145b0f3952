"""What a drafter is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trireme.policies.speculation import Mark


class Want(NamedTuple):
    """A sequence that decodes."""

    sequence_id: str
    history: Sequence[int]
    """All its tokens, oldest first; it only ever grows."""
    most: int
    """Tokens that may be drafted; at least 1."""
    is_greedy: bool
    left: int
    """Tokens that its answer can still have."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow a sequence's history, with what is known of each."""

    tokens: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    chances: tuple[float, ...] = ()
    """Of each to be right where those before it are."""

    def head(self, length: int) -> Proposal:
        """Its first tokens."""
        if length == len(self.tokens):
            return self
        return Proposal(self.tokens[:length], self.marks[:length], self.chances[:length])


NOTHING = Proposal()


class Drafter(Protocol):
    """Proposes tokens. It may be wrong in any way."""

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        """One proposal per want, possibly `NOTHING`.

        Args:
            batch: decoding sequences of the step, these among them.
        """

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        """Of what was proposed for a sequence, as much of it as was verified, so many tokens were right."""

    def forget(self, sequence_id: str) -> None:
        """The sequence has ended."""

    def close(self) -> None:
        """It is asked nothing more."""
