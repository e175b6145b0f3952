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
    """Drafts the tokens that a sequence will have, each wrong by chance."""

    def __init__(self, known: Mapping[str, Sequence[int]], chance: random.Random, *, wrong: float) -> None:
        self.known = known
        """By sequence: prompt and whole answer."""
        self.num_right: list[tuple[int, int]] = []
        """(right, verified) of each draft that was verified to its end."""
        self.forgotten: list[str] = []
        self._chance = chance
        self._wrong = wrong

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
        return Proposal(tuple(drafted), (mark,) * count, (0.9,) * count)

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
