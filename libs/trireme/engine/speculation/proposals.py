"""What a drafter is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trireme.engine.speculation.token_tree import TokenTree
from trireme.policies.speculation import Mark


class Want(NamedTuple):
    """A sequence that decodes."""

    sequence_id: str
    history: Sequence[int]
    """All its tokens, oldest first; it only ever grows."""
    most: int
    """Tokens that may be drafted one behind the other; at least 1."""
    is_greedy: bool
    left: int
    """Tokens that its answer can still have."""
    branches: int = 1
    """Continuations of one token that may be drafted; 1: chains."""
    most_in_all: int = 0
    """Tokens of all branches."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow a sequence's history, with what is known of each."""

    tokens: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    chances: tuple[float, ...] = ()
    """Of each to be right where those before it are."""
    parents: tuple[int, ...] | None = None
    """As of `TokenTree`."""

    @property
    def tree(self) -> TokenTree:
        """The tokens alone."""
        return TokenTree(self.tokens, self.parents)

    @property
    def reaches(self) -> list[float]:
        """The chance of each that it and all before it are right."""
        found: list[float] = []
        together = 1.0
        for place, chance in enumerate(self.chances):
            if self.parents is not None:
                parent = self.parents[place]
                together = 1.0 if parent < 0 else found[parent]
            together *= chance
            found.append(together)
        return found

    def head(self, length: int) -> Proposal:
        """Its first tokens."""
        if length == len(self.tokens):
            return self
        parents = None if self.parents is None else self.parents[:length]
        return Proposal(self.tokens[:length], self.marks[:length], self.chances[:length], parents)

    def trunk(self) -> Proposal:
        """The chain that it begins with."""
        if self.parents is None:
            return self
        length = 0
        while length < len(self.parents) and self.parents[length] == length - 1:
            length += 1
        return Proposal(self.tokens[:length], self.marks[:length], self.chances[:length])

    def ranked(self, want: Want) -> Proposal:
        """What of it is wanted, the likeliest first: then its heads are the best trees of their size."""
        if self.parents is None:
            return self.head(min(len(self.tokens), want.most))
        if want.branches == 1:
            return self.trunk().head(min(len(self.trunk().tokens), want.most))
        depths, reaches = self.tree.depths, self.reaches
        places = [place for place, depth in enumerate(depths) if depth <= want.most]
        # A token is never likelier to be reached than the one before it, which has the smaller place.
        places.sort(key=lambda place: -reaches[place])
        return self._of(places[: want.most_in_all])

    def arranged(self) -> Proposal:
        """The same with the likeliest path first, so that its tokens lie side by side; then the branches."""
        parents = self.parents
        if parents is None or len(parents) < 2:
            return self
        children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
        for place, parent in enumerate(parents):
            children[parent + 1].append(place)
        places: list[int] = []
        waiting = children[0][::-1]
        while waiting:
            places.append(waiting.pop())
            waiting += children[places[-1] + 1][::-1]
        return self._of(places)

    def _of(self, places: Sequence[int]) -> Proposal:
        """Those at some places, each of them behind its parent."""
        assert self.parents is not None
        new = {place: index for index, place in enumerate(places)}
        parents = tuple([-1 if (p := self.parents[place]) < 0 else new[p] for place in places])
        is_chain = all(parent == index - 1 for index, parent in enumerate(parents))
        return Proposal(
            tuple([self.tokens[place] for place in places]),
            tuple([self.marks[place] for place in places]),
            tuple([self.chances[place] for place in places]),
            None if is_chain else parents,
        )


NOTHING = Proposal()


class Growth:
    """A proposal in the making: a tree that grows by a token at a time."""

    __slots__ = ("_chances", "_children", "_marks", "depths", "parents", "reaches", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        """Places; -1: the sequence's last token."""
        self.depths: list[int] = []
        self.reaches: list[float] = []
        self._marks: list[Mark] = []
        self._chances: list[float] = []
        self._children: dict[int, dict[int, int]] = {-1: {}}

    def add(self, parent: int, token: int, mark: Mark, chance: float) -> int:
        """The place of a token behind that at `parent`; a new one, unless it is there already."""
        siblings = self._children[parent]
        if token in siblings:
            return siblings[token]
        place = siblings[token] = len(self.tokens)
        self._children[place] = {}
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        self.reaches.append(chance if parent < 0 else chance * self.reaches[parent])
        self._marks.append(mark)
        self._chances.append(chance)
        return place

    def children(self, parent: int) -> Mapping[int, int]:
        """Places by token."""
        return self._children[parent]

    def proposal(self) -> Proposal:
        """As it is now."""
        if not self.tokens:
            return NOTHING
        return Proposal(tuple(self.tokens), tuple(self._marks), tuple(self._chances), tuple(self.parents))


class Drafter(Protocol):
    """Proposes tokens. It may be wrong in any way."""

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        """One proposal per want, possibly `NOTHING`.

        Args:
            batch: decoding sequences of the step, these among them.
        """

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        """Of what was proposed for a sequence, as much of it as was verified, so many tokens were right.

        Of a tree the path is told that it began with.
        """

    def forget(self, sequence_id: str) -> None:
        """The sequence has ended."""

    def close(self) -> None:
        """It is asked nothing more."""
