"""Drafters that know the answer, and are wrong as often as wanted."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tests.unit.engine_support import VOCAB, settings
from trireme.engine import Engine
from trireme.engine.speculation.proposals import NOTHING, Proposal, Want
from trireme.models.model import Model
from trireme.policies.speculation import Mark, SpeculationSettings


class Oracle:
    """Drafts the tokens that a sequence will have, each wrong by chance, and branches beside them."""

    def __init__(
        self,
        known: Mapping[str, Sequence[int]],
        chance: random.Random,
        *,
        wrong: float,
        has_branches: bool = False,
    ) -> None:
        self.known = known
        """By sequence: prompt and whole answer."""
        self.num_right: list[tuple[int, int]] = []
        """(right, verified) of each draft that was verified to its end."""
        self.forgotten: list[str] = []
        self._chance = chance
        self._wrong = wrong
        self._has_branches = has_branches

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        return [self._propose(want) for want in wants]

    def _propose(self, want: Want) -> Proposal:
        chance = self._chance
        assert list(want.history) == list(self.known[want.sequence_id][: len(want.history)])
        if chance.random() < 0.1:
            return NOTHING
        count = chance.randint(1, want.most)
        start = len(want.history)
        tokens = list(self.known[want.sequence_id][start : start + count])
        tokens += [0] * (count - len(tokens))
        drafted = [chance.randrange(VOCAB) if chance.random() < self._wrong else token for token in tokens]
        mark = Mark("oracle", 0, want.is_greedy)
        if self._has_branches:
            return self._branched(drafted, mark, want.most_in_all)
        return Proposal(tuple(drafted), (mark,) * count, (0.9,) * count)

    def _branched(self, trunk: list[int], mark: Mark, most: int) -> Proposal:
        """The tokens among others, in any order in which each stands behind its parent."""
        chance = self._chance
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        while trunk or len(tokens) < most:
            if trunk and chance.random() < 0.5:
                parents.append(last)
                tokens.append(trunk.pop(0))
                last = len(tokens) - 1
            else:
                parents.append(chance.randrange(-1, len(tokens)))
                tokens.append(chance.randrange(VOCAB))
        chances = tuple(chance.choice([0.7, 0.9, 1.0]) for _ in tokens)
        return Proposal(tuple(tokens), (mark,) * len(tokens), chances, tuple(parents))

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        self.num_right.append((num_right, len(marks)))

    def close(self) -> None:
        pass

    def forget(self, sequence_id: str) -> None:
        self.forgotten.append(sequence_id)


def speculating(model: Model, *drafters: Any, draft: Model | None = None, **changes: Any) -> Engine:
    """A small engine that drafts five tokens whenever it can, whatever that costs."""
    wanted = {"fixed_tokens": 5, "matches": False, **changes.pop("speculation", {})}
    return Engine(
        model, settings(speculation=SpeculationSettings(**wanted), **changes), draft=draft, drafters=drafters
    )
