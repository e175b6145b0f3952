"""Trees from a smaller model, made before the target's step.

Every token that it reads gives its likeliest continuations as branches. Which of them it reads next is
decided by their chance to be reached, as many at once as pay; a round is one pass with tree attention.

Source: dynamic draft trees by the draft model's own confidence after Li et al., EAGLE-2 (arXiv 2406.16858,
section 4.1); chances are measured here, and the size of a round is by measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trireme.engine.speculation.draft_model import Live, ModelDrafter
from trireme.engine.speculation.draft_readers import SOURCE, NextTokens, Reader, mark_of
from trireme.engine.speculation.proposals import NOTHING, Growth, Proposal, Want

_ROOT: Final = -1


@dataclass(slots=True, eq=False)
class _Tree:
    """What grows for one sequence."""

    want: Want
    reader: Reader
    growth: Growth = field(default_factory=Growth)
    read: list[int] = field(default_factory=list)
    """Places whose keys and values lie behind the sequence's, in this order."""
    unread: list[int] = field(default_factory=list)

    def candidates(self) -> list[int]:
        """Places that may be read next, the likeliest first."""
        want, growth = self.want, self.growth
        room = want.most - len(self.read)
        deep_enough = [place for place in self.unread if growth.depths[place] < want.most]
        deep_enough.sort(key=lambda place: -growth.reaches[place])
        return deep_enough[: max(0, min(room, want.branches))]

    def rooted_parents(self, places: Sequence[int]) -> list[int]:
        """The tree of the sequence's last token, of what was read, and of these places."""
        order = {_ROOT: 0} | {place: index for index, place in enumerate((*self.read, *places), start=1)}
        return [-1, *(order[self.growth.parents[place]] for place in (*self.read, *places))]

    def leave(self) -> None:
        """The reader keeps what reads like a text: the path that was read first."""
        last = _ROOT
        for place in self.read:
            if self.growth.parents[place] != last:
                break
            self.reader.tokens.append(self.growth.tokens[place])
            last = place


class TreeDrafter(ModelDrafter):
    """Meets `Drafter`."""

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        live = self.ready_to_draft(wants, batch)
        chances = [self.controller.source_chance(SOURCE, entry.want.is_greedy) for entry in live]
        if not live or not self.controller.pays_to_draft(chances, batch=batch):
            return [NOTHING] * len(wants)
        trees = self._begin(live)
        while rounds := self._next_round(trees, batch):
            self._read_on(rounds)
        for tree in trees:
            tree.leave()
        found = {tree.want.sequence_id: tree.growth.proposal() for tree in trees}
        return [found.get(want.sequence_id, NOTHING) for want in wants]

    def _begin(self, live: Sequence[Live]) -> list[_Tree]:
        """Read what is new of the sequences; what may follow them are the first branches."""
        started_s = self.clock()
        kept = {entry.want.sequence_id for entry in live}
        trees: list[_Tree] = []
        chunks: list[tuple[Reader, Sequence[int]]] = []
        for entry in live:
            reader, history = entry.reader, entry.want.history
            if self.readers.hold(reader, len(history) + entry.want.most, keep=kept):
                trees.append(_Tree(entry.want, reader))
                chunks.append((reader, history[len(reader.tokens) :]))
        if chunks:
            most = max(tree.want.branches for tree in trees)
            for tree, following in zip(trees, self.readers.follow(chunks, most), strict=True):
                self._branch(tree, _ROOT, following)
            self.controller.observe_draft_step(len(chunks), self.clock() - started_s)
        return trees

    def _next_round(self, trees: Sequence[_Tree], batch: int) -> list[tuple[_Tree, list[int]]]:
        """What to read next of each tree; nothing, if it does not pay."""
        worth = [
            (
                tree.growth.reaches[place] * self.controller.source_chance(SOURCE, tree.want.is_greedy),
                index,
                place,
            )
            for index, tree in enumerate(trees)
            for place in tree.candidates()
        ]
        worth.sort(key=lambda one: -one[0])
        count = self.controller.worth_drafting([chance for chance, _, _ in worth], batch=batch)
        chosen: dict[int, list[int]] = {}
        for _, index, place in worth[:count]:
            chosen.setdefault(index, []).append(place)
        return [(trees[index], places) for index, places in chosen.items()]

    def _read_on(self, rounds: Sequence[tuple[_Tree, list[int]]]) -> None:
        """One pass over some places of some trees."""
        started_s = self.clock()
        found = self.readers.follow_branches(
            [
                (tree.reader, [tree.growth.tokens[place] for place in places], tree.rooted_parents(places))
                for tree, places in rounds
            ],
            max(tree.want.branches for tree, _ in rounds),
        )
        rows = iter(found)
        for tree, places in rounds:
            tree.read += places
            tree.unread = [place for place in tree.unread if place not in places]
            for place in places:
                self._branch(tree, place, next(rows))
        self.controller.observe_draft_step(len(found), self.clock() - started_s)

    def _branch(self, tree: _Tree, parent: int, following: NextTokens) -> None:
        """Tokens that may follow a place; the first is the likeliest."""
        for rank, (token, share) in enumerate(following[: tree.want.branches]):
            if not 0.0 <= share <= 1.0:  # scores that are not numbers
                continue
            mark = mark_of(share, is_greedy=tree.want.is_greedy, is_likeliest=rank == 0)
            tree.unread.append(tree.growth.add(parent, token, mark, self.controller.chance(mark)))
